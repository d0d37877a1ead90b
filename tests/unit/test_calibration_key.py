"""Which machine a calibration is of."""

from rollout_server.engine.calibration_key import cpu_name_in

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC

processor\t: 1
model\t\t: 99
"""


def test_processors_of_one_name_and_another_model_are_told_apart() -> None:
    assert cpu_name_in(CPUINFO.format(model=17)) == "AMD EPYC (cpu family 25, model 17)"
    assert cpu_name_in(CPUINFO.format(model=1)) != cpu_name_in(CPUINFO.format(model=17))


def test_a_processor_without_numbers_keeps_its_name() -> None:
    assert cpu_name_in("model name\t: Cortex\n") == "Cortex"
    assert cpu_name_in("") == "unknown cpu"
