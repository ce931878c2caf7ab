"""Fail when a test was skipped that this machine could have run.

Usage: python .ci/skips.py JUNIT_XML...

Two reasons are good: the test needs a GPU and there is none; it reads a file of the checkout's neighbour
`shared` and there is none.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Skips by reason, and whether the reason holds here.
ALLOWED = (
    (re.compile(r"\bGPU|\bCUDA", re.IGNORECASE), not Path("/dev/nvidiactl").exists()),
    (re.compile(r"\bshared\b"), not (ROOT.parent / "shared").exists()),
)


def main(paths: list[str]) -> int:
    bad: list[str] = []
    skipped = passed = 0
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            skip = case.find("skipped")
            if skip is None:
                passed += case.find("failure") is None and case.find("error") is None
                continue
            skipped += 1
            reason = skip.get("message") or ""
            if skip.get("type") == "pytest.xfail":
                reason = f"expected failure: {reason}"
            elif any(pattern.search(reason) and holds for pattern, holds in ALLOWED):
                continue
            bad.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    print(f"{passed} passed, {skipped} skipped, {len(bad)} of them without a good reason")
    for line in bad:
        print(f"  {line}")
    return 1 if bad or not passed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
