"""A validation's report as JUnit XML, which CI systems show."""

from __future__ import annotations

from xml.etree import ElementTree

from nemotrt.exporter.report.model import ValidationReport

Case = tuple[str, str]
"""A case's name, and why it failed; empty where it did not."""


def junit(report: ValidationReport, name: str) -> str:
    """One suite a scenario, one case a gate, and one a value that a bisection found; none at all is a failing case."""
    suites: dict[str, list[Case]] = {}
    for gate in report.gates:
        said = "" if gate.passed else f"{gate.value:.6g} where at most {gate.limit:.6g} may be"
        suites.setdefault(gate.scenario, []).append((f"{gate.output}: {gate.metric}", said))
    for suspect in report.bisect.diverging if report.bisect else ():
        said = "not finite" if suspect.error is None else f"{suspect.error:.6g}"
        said += f" where at most {suspect.limit:.6g} may be, first in {suspect.node} ({suspect.op})"
        suites.setdefault("bisect", []).append((f"{suspect.tensor}: relative L2", said))
    if not report.gates:
        suites[name] = [("anything was compared", "nothing was compared")]
    cases = [case for found in suites.values() for case in found]
    root = ElementTree.Element("testsuites", {"name": name} | _counts(cases))
    for suite, found in sorted(suites.items()):
        element = ElementTree.SubElement(root, "testsuite", {"name": suite} | _counts(found))
        for case, said in found:
            shown = ElementTree.SubElement(element, "testcase", classname=suite, name=case)
            if said:
                ElementTree.SubElement(shown, "failure", message=said)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(cases: list[Case]) -> dict[str, str]:
    return {"tests": str(len(cases)), "failures": str(sum(bool(said) for _, said in cases))}
