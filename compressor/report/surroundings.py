"""The machine, the process and the versions behind the timings."""

from collections.abc import Iterator

from compressor.report.blocks import Facts, Section
from compressor.report.numbers import number, size
from compressor.report.schema import Report
from profiles.host import Environment


def section(report: Report) -> Section:
    return Section("Environment", (Facts({"Compressed on": report.computed_on} | dict(_facts(report.environment))),))


def _facts(machine: Environment) -> Iterator[tuple[str, str]]:
    first, last = machine.moments[0], machine.moments[-1]
    yield "CPU", machine.cpu + (", under a hypervisor" if machine.virtual else "")
    yield "Extensions", " ".join(machine.flags) or "none listed"
    quota = "" if machine.quota_cores is None else f", quota of {number(machine.quota_cores)} cores"
    allowed = ", ".join(str(cpu) for cpu in machine.affinity)
    yield "Cores", f"{machine.physical_cores} physical, {machine.logical_cores} logical; may run on {allowed}{quota}"
    yield "Frequency governor", machine.governor
    yield "Clock, first to last", f"{_clock(first.clock_mhz)} to {_clock(last.clock_mhz)}"
    yield "Load average, first to last", f"{first.load_average[0]:.2f} to {last.load_average[0]:.2f} over 1 minute"
    free = f"{size(first.memory_available_bytes)} to {size(last.memory_available_bytes)}"
    yield "Memory", f"{size(machine.memory_bytes)}, available {free}"
    if machine.gpus:
        yield "GPU", ", ".join(machine.gpus)
    yield "System", machine.system
    yield "Python", machine.python
    yield "Libraries", ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    yield "Thread settings", ", ".join(f"{k}={v}" for k, v in machine.variables.items()) or "none set"


def _clock(clocks: tuple[float, ...]) -> str:
    if not clocks:
        return "not exposed"
    low, high = round(min(clocks)), round(max(clocks))
    return f"{low:,} MHz" if low == high else f"{low:,}\N{EN DASH}{high:,} MHz"
