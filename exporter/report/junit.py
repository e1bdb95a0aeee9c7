"""The validation report as JUnit XML, which CI systems display."""

from xml.etree import ElementTree

from nemotrt.exporter.report.model import ValidationReport


def junit(report: ValidationReport, name: str) -> str:
    """A suite for each scenario with a case for each gate, and one case for each value that diverges.

    A report without gates is one failing case.
    """
    cases = []
    for gate in report.gates:
        failure = "" if gate.passed else _excess(gate.value, gate.limit)
        cases.append((gate.scenario, f"{gate.output}: {gate.metric}", failure))
    for value in report.bisect.diverging if report.bisect else ():
        failure = f"{_excess(value.error, value.limit)}, first at {value.node} ({value.op})"
        cases.append(("bisect", f"{value.tensor}: relative L2", failure))
    if not report.gates:
        cases = [(name, "gates", "nothing was compared")]
    root = ElementTree.Element("testsuites", name=name)
    for suite in sorted({suite for suite, _, _ in cases}):
        element = ElementTree.SubElement(root, "testsuite", name=suite)
        for _, case, failure in filter(lambda entry: entry[0] == suite, cases):
            testcase = ElementTree.SubElement(element, "testcase", classname=suite, name=case)
            if failure:
                ElementTree.SubElement(testcase, "failure", message=failure)
    for element in (root, *root):
        element.set("tests", str(len(element.findall(".//testcase"))))
        element.set("failures", str(len(element.findall(".//failure"))))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _excess(value: float | None, limit: float) -> str:
    return f"{'not finite' if value is None else f'{value:.6g}'} exceeds the limit {limit:.6g}"
