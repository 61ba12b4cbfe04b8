"""The recipe as it was resolved, defaults and all."""

import json

from compressor.report.blocks import Code, Facts, Section
from compressor.report.schema import Report


def section(report: Report) -> Section:
    facts = Facts({"Command": report.command, "Seed": str(report.seed)})
    text = json.dumps(report.model_dump(mode="json")["recipe"], indent=2, ensure_ascii=False)
    return Section("Recipe, with every default", (facts, Code(text)))
