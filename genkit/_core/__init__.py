"""Private helpers of every submodule: argument checks, fields of modules, resampling."""
