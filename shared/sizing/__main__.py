"""``python -m shared.sizing``: write the tables of ``docs/sizing.md`` anew."""

from __future__ import annotations

import sys

from shared.sizing.tables import PAGE, with_tables


def main() -> int:
    """Exit code 0; says which page it wrote."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
