"""Keys of sites: derived from the site's address, equal in every replay and in every process."""

import hashlib
import zlib

import jax.extend
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key


def trace_state() -> object:
    """An opaque, comparable mark of the JAX transformation we are under."""
    return jax.extend.core.get_opaque_trace_state(convention="genkit")


class NameHashes:
    """Two 32-bit words for every name of one run.

    The first is the CRC-32 of the name. The second is zero, except for a name whose CRC-32 another name of the run
    already has ("plumless" and "buckeroo"): such names would draw the same numbers.
    """

    def __init__(self) -> None:
        self._owners: dict[int, str] = {}

    def words(self, name: str) -> tuple[int, int]:
        """The two words of `name`."""
        first = zlib.crc32(name.encode())
        owner = self._owners.setdefault(first, name)
        if owner == name:
            return first, 0
        # Not a second CRC: it is linear, names of equal length that collide once collide with any suffix.
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        return first, int.from_bytes(digest, "little") | 1


def fold_name(key: Key[Array, ""], name: str, hashes: NameHashes | None = None) -> Key[Array, ""]:
    """A key for `name`, equal in every process (Python's own string hash is not)."""
    first, second = (hashes or NameHashes()).words(name)
    key = jr.fold_in(key, first)
    return jr.fold_in(key, second) if second else key


def site_key(key: Key[Array, ""], address: str, hashes: NameHashes) -> Key[Array, ""]:
    """A key for a site, at no cost: the words of the address are mixed into the words of the key.

    Threefry is a block cipher made to be keyed with related keys (JAX's own seeds are), so streams stay independent.
    Only for keys that are drawn from: keys of inner frames are hashed (`fold_name`), or two mixings could undo each
    other.
    """
    if jr.key_impl(key) != "threefry2x32":
        return fold_name(key, address, hashes)
    tweak = np.array(hashes.words(address), np.uint32)
    return jr.wrap_key_data(jr.key_data(key) ^ tweak, impl="threefry2x32")
