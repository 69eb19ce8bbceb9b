"""The compiled module, or an error that says what to do."""

try:
    from tardkd import _native as native_module  # noqa: F401 (ours to give)
except ImportError as error:
    raise ImportError(
        f"tardkd's compiled module cannot be loaded ({error}). Imported from {__file__}: if that is a source tree, "
        'install it ("pip install ." and run from another folder, or "pip install -e .")'
    ) from error
