"""The array store: what goes in comes out, and nothing else ever does."""

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from genkit.storage import (
    CorruptFileError,
    SaveError,
    _files as files,
    hash_tree,
    load_arrays,
    lock_folder,
    read_archive,
    read_arrays,
    same_program,
    save_arrays,
    write_archive,
)
from genkit.storage._layout import DTYPES, MAGIC, MAX_HEADER, PRELUDE, header_digest


def everything():
    key = jax.random.key(0)
    return {
        "net": eqx.nn.MLP(2, 3, 4, 1, key=key),
        "half": jnp.linspace(0, 1, 5).astype(jnp.bfloat16),
        "small": jnp.arange(-3, 4).astype(jnp.int4),
        "eighth": jnp.linspace(-1, 1, 4).astype(jnp.float8_e4m3fn),
        "keys": jax.random.split(jax.random.key(7), 3),
        "rbg": jax.random.key(1, impl="rbg"),
        "numpy": np.arange(4.0),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">i4"),
        "strided": np.arange(10)[::3],
        "generic": np.float32(2.5),
        "complex": jnp.array([1 + 2j]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.array(True),
        "weak": jnp.asarray(0.1),
        "nan": jnp.array([jnp.nan, -jnp.inf, -0.0]),
        "python": (3, 2**70, -1.5, float("nan"), float("inf"), True, "text", None),
    }


def assert_same(got, want):
    got_leaves, got_tree = jax.tree.flatten(got)
    want_leaves, want_tree = jax.tree.flatten(want)
    assert got_tree == want_tree
    for g, w in zip(got_leaves, want_leaves, strict=True):
        assert isinstance(g, jax.Array) == isinstance(w, jax.Array)
        assert getattr(g, "weak_type", False) == getattr(w, "weak_type", False)
        if isinstance(w, jax.Array) and jnp.issubdtype(w.dtype, jax.dtypes.prng_key):
            assert g.dtype == w.dtype
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        if isinstance(w, (jax.Array, np.ndarray, np.generic)):
            assert g.dtype.newbyteorder("=") == w.dtype.newbyteorder("=") and g.shape == w.shape
            assert np.ascontiguousarray(g).tobytes() == np.asarray(w, w.dtype.newbyteorder("<"), order="C").tobytes()
        elif callable(w):
            assert g is w
        else:
            assert type(g) is type(w) and repr(g) == repr(w)


@pytest.fixture
def small(tmp_path):
    """A small file and the tree it holds."""
    tree = {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "key": jax.random.key(3), "n": np.arange(3), "p": 0.5}
    path = tmp_path / "small.gk"
    save_arrays(path, tree, meta={"steps": 3})
    return path, tree


def test_everything_returns_bit_by_bit(tmp_path):
    tree = everything()
    save_arrays(tmp_path / "all.gk", tree)
    assert_same(load_arrays(tmp_path / "all.gk", tree), tree)


def test_double_precision_returns_and_is_never_rounded_silently(tmp_path):
    with jax.enable_x64(True):
        tree = {"w": jnp.array([1 / 3])}
        save_arrays(tmp_path / "double.gk", tree)
        assert_same(load_arrays(tmp_path / "double.gk", tree), tree)
    with pytest.raises(ValueError, match=r"in float64, which JAX turns into float32.*jax_enable_x64"):
        read_arrays(tmp_path / "double.gk")


def test_a_skeleton_of_shapes_is_enough(small):
    path, tree = small
    like = {**tree, "w": jax.ShapeDtypeStruct((2, 3), jnp.float32), "key": jax.eval_shape(lambda: jax.random.key(0))}
    assert_same(load_arrays(path, like), tree)


def test_the_header_is_readable_alone(small):
    stored = read_arrays(small[0], header_only=True)
    assert stored.meta == {"steps": 3} and stored.leaves == {}
    assert stored.headers["['w']"] == {"path": "['w']", "kind": "jax", "dtype": "float32", "shape": [2, 3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((3, 2))}, r"leaf `\['w'\]` must be float32\[3, 2\]; the file has float32\[2, 3\]"),
        ({"w": jnp.zeros((2, 3), int)}, r"leaf `\['w'\]` must be int32\[2, 3\]; the file has float32\[2, 3\]"),
        ({"w": 0.0}, r"leaf `\['w'\]` must be a Python float; the file has float32\[2, 3\]"),
        ({"w": {"a": 0}}, r"leaf `\['w'\]\['a'\]` must be a Python int; the file has no such leaf"),
        (
            {"key": jax.random.key(0, impl="rbg")},
            r"must be key<rbg>\[\]; the file has key<threefry2x32>\[\]",
        ),
        ({"p": 1}, r"leaf `\['p'\]` must be a Python int; the file has a Python float"),
        ({"p": None}, r"it has a leaf `\['p'\]` \(a Python float\) that is not expected"),
        ({"p": jax.nn.relu}, r"leaf `\['p'\]` must be `jax:relu`; the file has a Python float"),
    ],
)
def test_a_skeleton_that_differs_is_refused_by_leaf(small, change, message):
    path, tree = small
    with pytest.raises(ValueError, match=message):
        load_arrays(path, {**tree, **change})


def test_functions_and_static_fields_must_agree(tmp_path):
    # Other formats restore these without a word: the shapes are the same.
    make = lambda **options: eqx.nn.MLP(2, 2, 4, 1, **options, key=jax.random.key(0))
    save_arrays(tmp_path / "net.gk", make())
    with pytest.raises(ValueError, match=r"`.activation` must be `jax:gelu`; the file has `jax:relu`"):
        load_arrays(tmp_path / "net.gk", make(activation=jax.nn.gelu))
    save_arrays(tmp_path / "conv.gk", eqx.nn.Conv2d(1, 1, 3, stride=2, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"`.stride` must be \[1, 1\]; the file has \[2, 2\]"):
        load_arrays(tmp_path / "conv.gk", eqx.nn.Conv2d(1, 1, 3, key=jax.random.key(0)))


def test_hash_tells_trees_apart():
    hashes = {hash_tree(tree) for tree in (1, 1.0, jnp.ones(2), np.ones(2), jnp.ones((2, 1)), [jnp.ones(2)])}
    assert len(hashes) == 6
    assert hash_tree(everything()) == hash_tree(everything())


# Damage: every kind is refused with the file and the reason.


def assert_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        read_arrays(path)
    assert str(path) in str(caught.value) and len(caught.value.reason) > 10


def test_a_thousand_flipped_bits(small, tmp_path):
    content = small[0].read_bytes()
    rng = np.random.default_rng(0)
    # Every bit of what comes before the header, then random ones of the whole file.
    bits = [*range(8 * PRELUDE.size), *rng.integers(0, 8 * len(content), 1000)]
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        assert_refused(tmp_path / "flipped.gk", bytes(damaged))


def test_two_hundred_truncations_and_trailing_bytes(small, tmp_path):
    content = small[0].read_bytes()
    for length in np.linspace(0, len(content) - 1, 200).astype(int):
        assert_refused(tmp_path / "cut.gk", content[:length])
    for tail in (b"\0", b"\n", content, os.urandom(100)):
        assert_refused(tmp_path / "long.gk", content + tail)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/genkit-was-here",)


def foreign_files():
    rng = np.random.default_rng(1)
    archive, arrays = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../escape", "x")
    np.savez(arrays, w=np.ones(3))
    named = [
        pickle.dumps(Bomb()),
        pickle.dumps({"w": np.ones(3)}, protocol=0),
        archive.getvalue(),
        arrays.getvalue(),
        b"",
        b"import os\nos.mkdir('/tmp/genkit-was-here')\n",
        b"{}",
        b"\x7fELF" + bytes(200),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\x93NUMPY\x01\x00" + bytes(200),
        (8).to_bytes(8, "little") + b'{"a":{}}',
        MAGIC,
        MAGIC[:-1] + b"\x02" + bytes(100),
    ]
    return named + [rng.bytes(int(n)) for n in rng.integers(1, 5000, 50)] + [MAGIC + rng.bytes(n) for n in range(40)]


def test_a_hundred_foreign_files(tmp_path):
    contents = foreign_files()
    assert len(contents) >= 100
    for content in contents:
        assert_refused(tmp_path / "foreign.gk", content)
    assert not os.path.exists("/tmp/genkit-was-here")


def forge(header, payload=b""):
    """A file whose checksums are right and whose header is not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return PRELUDE.pack(MAGIC, len(text), header_digest(text)) + text + payload


def header(leaves, size=0, payload=b"", **changes):
    digest = hashlib.sha256(payload).hexdigest()
    return {
        "format": 1,
        "payload": {"bytes": size, "sha256": digest},
        "leaves": leaves,
        "statics": {},
        "meta": {},
    } | changes


LEAF = {"path": "w", "kind": "jax", "dtype": "float32", "shape": [2]}


@pytest.mark.parametrize(
    "forged",
    [
        b"not json",
        b"[" * 100_000,
        b"[]",
        b'{"format": 1}',
        header([], format=2),
        header([], meta=[]),
        header([], statics={"w": 1}),
        header([LEAF | {"shape": [2**60, 2**60]}], 8),
        header([LEAF | {"shape": [-2]}], 8),
        header([LEAF | {"shape": [2.0]}], 8),
        header([LEAF | {"shape": [True]}], 1),
        header([LEAF | {"shape": [1] * 40}], 4),
        header([LEAF | {"shape": [0] + [2**47] * 20}]),
        header([LEAF | {"weak": True}], 8),
        header([LEAF | {"path": str(i), "shape": [0]} for i in range(100_001)]),
        header([LEAF | {"dtype": "object"}], 16),
        header([LEAF | {"dtype": "float128"}], 32),
        header([LEAF | {"kind": "pickle"}], 8),
        header([LEAF | {"kind": "key", "impl": "mine"}], 16),
        header([LEAF | {"path": 3}], 8),
        header([LEAF], 12),
        header([{"path": "p", "kind": "scalar", "type": "float", "value": 1}]),
        header([{"path": "p", "kind": "scalar", "type": "exec", "value": 1}]),
        header([{"path": "p", "kind": "scalar", "type": "int", "value": 1}] * 2),
        header([LEAF], 8, bytes(8)) | {"payload": {"bytes": 8, "sha256": "0" * 64}},
    ],
)
def test_forged_headers_are_refused(forged, tmp_path):
    size = forged["payload"]["bytes"] if isinstance(forged, dict) else 0
    assert_refused(tmp_path / "forged.gk", forge(forged, bytes(size)))


def test_the_forger_can_also_write_a_sound_file(tmp_path):
    # So the refusals above are about what was changed.
    path = tmp_path / "sound.gk"
    path.write_bytes(forge(header([LEAF], 8, bytes(8)), bytes(8)))
    assert read_arrays(path).leaves["w"].tolist() == [0.0, 0.0]


def test_an_absurd_header_length_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "huge.gk"
    for length in (MAX_HEADER + 1, 2**40, 2**64 - 1):
        path.write_bytes(PRELUDE.pack(MAGIC, length, bytes(32)))
        with pytest.raises(CorruptFileError, match=f"its header claims {length} bytes"):
            read_arrays(path)


def test_what_is_not_there_or_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*gone.gk"):
        read_arrays(tmp_path / "gone.gk")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        read_arrays(tmp_path)


# Writing: all or nothing.


def leftovers(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_objects_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(TypeError, match="dtype object cannot be saved"):
        save_arrays(tmp_path / "object.gk", {"w": np.array([object()])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(small, monkeypatch, when):
    path, tree = small
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "write":
        monkeypatch.setattr("genkit.storage._arrays._raw", fail)
    elif when == "fsync":
        monkeypatch.setattr(files.os, "fsync", fail)
    else:
        monkeypatch.setattr(files.Path, "replace", fail)
    with pytest.raises((SaveError, OSError)) as caught:
        save_arrays(path, tree)
    if when != "write":  # `_raw` fails before the file is opened, too
        assert "No space left on device; the file that was there is intact" in str(caught.value)
    assert path.read_bytes() == before and not leftovers(path.parent)


FULL = """
import resource, signal, sys
import numpy as np
from genkit import SaveError
from genkit.storage import save_arrays
path = sys.argv[1]
save_arrays(path, np.arange(10))
before = open(path, "rb").read()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in (path, path + ".new"):
    try:
        save_arrays(name, np.zeros(100_000))
    except SaveError as error:
        print(error)
assert open(path, "rb").read() == before
"""


def test_a_full_disk(tmp_path):
    path = tmp_path / "full.gk"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.endswith(f"could not write `{path}`: File too large; the file that was there is intact")
    assert second.endswith(f"could not write `{path}.new`: File too large; nothing was written")
    assert [p.name for p in tmp_path.iterdir()] == ["full.gk"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_no_folder_to_write_to(tmp_path):
    with pytest.raises(SaveError, match="No such file or directory; nothing was written"):
        save_arrays(tmp_path / "no" / "folder.gk", 1)


def test_an_interrupt_while_writing_leaves_the_old_file(small, monkeypatch):
    path, tree = small
    before = path.read_bytes()

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_arrays(path, tree)
    assert path.read_bytes() == before and not leftovers(path.parent)


def test_every_dtype_of_the_format_returns(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        name: np.frombuffer(rng.integers(0, 2, 16, dtype=np.uint8).tobytes(), dtype) for name, dtype in DTYPES.items()
    }
    assert ml_dtypes.bfloat16 in {array.dtype.type for array in tree.values()}
    save_arrays(tmp_path / "dtypes.gk", tree)
    assert_same(load_arrays(tmp_path / "dtypes.gk", tree), tree)


# What stands at the path already


def test_permissions_and_links_are_kept(tmp_path):
    path, link = tmp_path / "a.gk", tmp_path / "link.gk"
    save_arrays(path, np.arange(3))
    path.chmod(0o640)
    link.symlink_to(path)
    save_arrays(link, np.arange(4))
    assert link.is_symlink() and load_arrays(path, np.arange(4)).tolist() == [0, 1, 2, 3]
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target, kind in ((tmp_path / "pipe", "neither a file nor a folder"), (tmp_path, "a folder")):
        with pytest.raises(SaveError, match=f"it is {kind}; nothing was written"):
            save_arrays(target, np.arange(3))
    assert not leftovers(tmp_path)


# Archives of draws


def test_every_flip_in_an_archive_is_refused_or_harmless(tmp_path):
    path = tmp_path / "draws.npz"
    arrays = {"x": np.random.default_rng(0).normal(size=50), "y": np.arange(5), "z": np.ones((2, 3), order="F")}
    write_archive(path, arrays, "a note")
    content = path.read_bytes()
    refused = 0
    for bit in np.random.default_rng(1).integers(0, 8 * len(content), 1000):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found, _ = read_archive(path)
        except CorruptFileError:
            refused += 1
            continue
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    assert refused > 700


def test_archives_that_unfold_to_much_are_not_read(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros(2**29, np.uint8))
    with pytest.raises(CorruptFileError, match="its arrays take 536871040 bytes, more than the 268435456 allowed"):
        read_archive(path)
    np.savez_compressed(path, x=np.zeros(1000, np.uint8))
    with pytest.raises(CorruptFileError, match="more than the 100 allowed"):
        read_archive(path, max_bytes=100)


def test_a_member_that_claims_another_size_is_refused(tmp_path):
    path = tmp_path / "claims.npz"
    text = io.BytesIO()
    np.lib.format.write_array(text, np.zeros(4))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", text.getvalue().replace(b"(4,)", b"(9,)"))
    with pytest.raises(CorruptFileError, match="claims 72 bytes of numbers"):
        read_archive(path)


# Folders with one writer


def test_a_folder_is_held_once_and_left_as_it_was(tmp_path):
    with lock_folder(tmp_path / "deep" / "run"):
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on"):
            with lock_folder(tmp_path / "deep" / "run"):
                pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("stays")
    with lock_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_files_equal_but_for_comments_are_one_program():
    assert same_program(b"x = 1\n", b"# one\nx  =  1")
    assert not same_program(b"x = 1\n", b"x = 2\n")
    assert not same_program(b"x = ", b"y = ")
