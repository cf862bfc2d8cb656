"""Which versions of another library an integration works with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def require_version(
    package: str, label: str, works_with: tuple[tuple[int, ...], tuple[int, ...]], why: str
) -> None:
    """Check that ``package`` is installed in a version from the first of ``works_with`` and below
    the second. ``label`` is its name in messages, ``why`` what of it the integration relies on.

    Raises:
        ImportError: there is no such package, or it is another version; names the range.
    """
    first, below = (".".join(map(str, numbers)) for numbers in works_with)
    needed = f"{package}>={first},<{below}"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{label} is not installed; run: pip install '{needed}'") from None
    digits = len(works_with[0])
    numbers = tuple(int(part) for part in found.split(".")[:digits] if part.isdigit())
    if not works_with[0] <= numbers < works_with[1]:
        raise ImportError(
            f"{label} {found} is installed, and this integration works with {needed}: it {why}; "
            f"run: pip install '{needed}'"
        )
