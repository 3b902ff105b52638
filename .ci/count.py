"""Prints how many tests of a JUnit report ran, and fails under a minimum: count.py REPORT MINIMUM."""

import sys
import xml.etree.ElementTree as ElementTree

report, minimum = sys.argv[1], int(sys.argv[2])
suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
total = sum(int(suite.get("tests", 0)) for suite in suites)
skipped = sum(int(suite.get("skipped", 0)) for suite in suites)
print(f"{report}: {total - skipped} tests ran, {skipped} skipped, at least {minimum} expected")
if total - skipped < minimum:
    sys.exit(f"too few tests ran: {total - skipped} < {minimum}")
