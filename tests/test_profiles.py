"""Device profiles load, refuse faults in words and mean something to TVM; the host is detected from what Linux says."""

import os
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from profiles import device, host
from profiles.device import Device, load, names
from profiles.errors import ProfileError
from profiles.settings import Settings, faults

GOOD = """
kind = "cpu"
description = "a board"
cores = 2

[target]
kind = "llvm"
mcpu = "cortex-a53"
num-cores = 2
"""

AVX2 = "avx2 fma bmi1 bmi2 f16c movbe abm sse4_2 ssse3 popcnt"
AVX512 = f"{AVX2} avx512f avx512bw avx512cd avx512dq avx512vl"
ICELAKE = (
    f"{AVX512} avx512_vnni avx512_vbmi2 avx512_bitalg avx512_vpopcntdq avx512ifma avx512vbmi gfni vaes avx512_bf16"
)
SAPPHIRE = f"{ICELAKE} avx512_fp16 avx_vnni amx_tile amx_int8 amx_bf16"


def cpuinfo(flags: str, cpus: int = 2, key: str = "flags") -> str:
    return "\n\n".join(f"processor\t: {i}\nmodel name\t: Test CPU\n{key}\t\t: {flags}" for i in range(cpus))


@pytest.mark.parametrize("name", names())
def test_every_profile_loads_under_its_own_name(name: str) -> None:
    profile = load(name)
    assert profile.name == name
    assert profile.description
    assert profile.kind == "fpga" or profile.channel_multiple % min(profile.vector_lanes, 8) == 0


@pytest.mark.parametrize("name", [*names("cpu"), *names("gpu")])
def test_tvm_knows_the_target_and_its_processors(name: str) -> None:
    target = pytest.importorskip("tvm.target")
    given = dict(load(name).target)
    parsed = target.Target(given)
    assert parsed.kind.name == given["kind"]
    machine = given.get("host", given)
    assert isinstance(machine, dict)
    triple = machine.get("mtriple", "x86_64-linux-gnu" if os.uname().machine == "x86_64" else "aarch64-linux-gnu")
    known = target.codegen.llvm_get_cpu_archlist(target.Target({"kind": "llvm", "mtriple": triple}))
    assert machine["mcpu"] in list(known)


@pytest.mark.parametrize("mcpu", host.X86)
def test_llvm_knows_every_name_the_host_may_get(mcpu: str) -> None:
    target = pytest.importorskip("tvm.target")
    known = target.codegen.llvm_get_cpu_archlist(target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu"}))
    assert mcpu in list(known)


def test_names_by_kind_are_disjoint_and_complete() -> None:
    kinds = [names("cpu"), names("gpu"), names("fpga")]
    assert sorted(sum(kinds, ())) == sorted(names())
    assert names("cpu")[0] == "host"
    assert "zcu104" in names("fpga")


def test_a_wrong_name_offers_the_nearest() -> None:
    with pytest.raises(ProfileError) as error:
        load("raspberrypi-5")
    assert str(error.value) == "No device 'raspberrypi-5'. Did you mean 'raspberry-pi-5'?"


def test_a_path_without_its_ending_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"A path ends in '\.toml'\.$"):
        load(tmp_path / "board")


def test_a_users_folder_comes_before_the_built_in_profiles(tmp_path: Path) -> None:
    (tmp_path / "zcu104.toml").write_text(GOOD)
    (tmp_path / "mine.toml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("not a profile")
    assert load("zcu104", [tmp_path]).kind == "cpu"
    assert load("zcu104").kind == "fpga"
    assert load(tmp_path / "mine.toml").name == "mine"
    assert set(names(search=[tmp_path])) - set(names()) == {"mine"}
    with pytest.raises(ProfileError, match="No folder"):
        load("zcu104", [tmp_path / "absent"])


def test_all_faults_of_a_profile_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('kind = "dsp"\ncorse = 2\nvector_bits = "wide"\n')
    with pytest.raises(ProfileError) as error:
        load(file)
    assert str(error.value).splitlines() == [
        "Device profile 'bad.toml': 'kind' = 'dsp': should be 'cpu', 'gpu' or 'fpga'.",
        "Device profile 'bad.toml': 'description' is missing.",
        "Device profile 'bad.toml': 'vector_bits' = 'wide': should be a valid integer, unable to parse string as an"
        " integer.",
        "Device profile 'bad.toml': no option 'corse'. Did you mean 'cores'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "x = [", "is not TOML"),
        ('name = "other"\n' + GOOD, "called as its file is; remove 'name'"),
        (GOOD.replace("num-cores = 2", "num-cores = 8"), "'num-cores' is 8, but 'cores' is 2"),
        (GOOD.split("[target]")[0], "[target] of a cpu needs 'kind'"),
    ],
)
def test_a_profile_that_contradicts_itself_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "board.toml"
    file.write_text(text)
    with pytest.raises(ProfileError) as error:
        load(file)
    assert message in str(error.value)


def test_an_unreadable_profile_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="No such file"):
        load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("flags", "mcpu", "bits", "registers"),
    [
        (SAPPHIRE, "sapphirerapids", 512, 32),
        (f"{ICELAKE} sse4a clzero", "znver4", 512, 32),
        (ICELAKE, "icelake-server", 512, 32),
        (f"{AVX512} avx512_vnni", "cascadelake", 512, 32),
        (AVX512, "x86-64-v4", 512, 32),
        (AVX2, "x86-64-v3", 256, 16),
        ("sse4_2 ssse3 popcnt", "x86-64-v2", 128, 16),
        ("sse2", "x86-64", 128, 16),
    ],
)
def test_x86_flags_become_the_most_capable_cpu_that_has_no_more(
    flags: str, mcpu: str, bits: int, registers: int
) -> None:
    found = host.describe(cpuinfo(flags), "x86_64", 2)
    assert found.target == {"kind": "llvm", "num-cores": 2, "mcpu": mcpu}
    assert (found.vector_bits, found.vector_registers, found.channel_multiple) == (bits, registers, bits // 32)


def test_one_missing_flag_falls_back_rather_than_crash_later() -> None:
    for flag in ("amx_tile", "avx512_fp16"):
        text = cpuinfo(" ".join(set(SAPPHIRE.split()) - {flag}))
        assert host.describe(text, "x86_64", 1).target["mcpu"] == "icelake-server"


def test_only_what_every_core_has_counts() -> None:
    text = cpuinfo(AVX512, cpus=1) + "\n\n" + cpuinfo(AVX2, cpus=1)
    assert host.describe(text, "x86_64", 2).target["mcpu"] == "x86-64-v3"


def test_an_aarch64_host_gets_the_features_it_names() -> None:
    found = host.describe(cpuinfo("fp asimd aes asimddp", key="Features"), "aarch64", 4)
    assert found.target["mattr"] == ["+neon", "+dotprod"]
    assert (found.vector_bits, found.vector_registers) == (128, 32)


def test_another_machine_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"'riscv64'.*Name a device instead"):
        host.describe("", "riscv64", 4)


def test_without_proc_the_host_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(ProfileError, match="Name a device instead"):
        load("host")


def test_cores_leave_out_hyperthreads_and_honour_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(host, "CPU_FOLDER", tmp_path)
    monkeypatch.setattr(host, "QUOTA", quota)
    allowed = set(range(8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    assert host.cores() == 4
    allowed = {0, 4, 1}
    assert host.cores() == 2
    quota.write_text("max 100000\n")
    assert host.cores() == 2
    quota.write_text("150000 100000\n")
    assert host.cores() == 1
    quota.write_text("50000 100000\n")
    assert host.cores() == 1


def test_the_environment_holds_what_a_timing_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    now = host.environment()
    assert now.cpu
    assert 1 <= now.physical_cores <= now.logical_cores
    assert set(now.affinity) == os.sched_getaffinity(0)
    assert 0 < now.moments[0].memory_available_bytes <= now.memory_bytes
    assert now.variables["OMP_NUM_THREADS"] == "3"
    assert {"torch", "numpy"} <= set(now.libraries)
    after = now.later()
    assert len(after.moments) == 2
    assert after.moments[1].at >= after.moments[0].at
    assert after.cpu == now.cpu


def test_the_host_profile_is_usable_here() -> None:
    assert 1 <= load("host").cores <= len(os.sched_getaffinity(0))
    assert load("host").name == device.HOST


class Inner(Settings):
    ratio: float = 0.5


class Outer(Settings):
    inner: Inner = Inner()
    steps: tuple[Inner, ...] = ()
    size: int = Field(default=1, alias="schema")


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"inner": {"ration": 1}}, "here: no option 'ration' in [inner]. Did you mean 'ratio'?"),
        ({"steps": [{"ratio": 1}, {"rat": 1}]}, "here: no option 'rat' in [steps.1]. Did you mean 'ratio'?"),
        ({"schem": 1}, "here: no option 'schem'. Did you mean 'schema'?"),
        ({"zzz": 1}, "here: no option 'zzz'. Possible: inner, schema, steps."),
        ({"steps": {"a": 1}}, "here: 'steps': should be a valid tuple."),
        ({"schema": "x" * 80}, f"here: 'schema' = '{'x' * 59}...: should be a valid integer, unable to parse string"),
    ],
)
def test_faults_read_as_sentences(table: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(table)
    (found,) = faults(error.value, Outer, "here")
    assert found.startswith(sentence)


def test_devices_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Device.__setattr__(load("x86-64-v3"), "cores", 9)
