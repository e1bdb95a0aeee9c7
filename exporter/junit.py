"""A validation's report as JUnit XML, which CI systems show."""

from __future__ import annotations

from itertools import groupby
from xml.etree import ElementTree

from nemotrt.exporter.artifacts import ValidationReport


def junit(report: ValidationReport, name: str) -> str:
    """One suite a scenario, one case a gate; no gate at all is a failing case."""
    failed = sum(not gate.passed for gate in report.gates)
    count = len(report.gates)
    root = ElementTree.Element(
        "testsuites", name=name, tests=str(count or 1), failures=str(failed if count else 1)
    )
    by_scenario = sorted(report.gates, key=lambda gate: gate.scenario)
    for scenario, group in groupby(by_scenario, key=lambda gate: gate.scenario):
        gates = list(group)
        lost = sum(not gate.passed for gate in gates)
        suite = ElementTree.SubElement(
            root, "testsuite", name=scenario, tests=str(len(gates)), failures=str(lost)
        )
        for gate in gates:
            case = ElementTree.SubElement(
                suite, "testcase", classname=scenario, name=f"{gate.output}: {gate.metric}"
            )
            if not gate.passed:
                said = f"{gate.value:.6g} where at most {gate.limit:.6g} may be"
                ElementTree.SubElement(case, "failure", message=said)
    if not count:
        suite = ElementTree.SubElement(root, "testsuite", name=name, tests="1", failures="1")
        case = ElementTree.SubElement(suite, "testcase", classname=name, name="anything was compared")
        ElementTree.SubElement(case, "failure", message="nothing was compared")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
