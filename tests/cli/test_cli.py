"""The command line: every command through the installed entry point, and its options, codes and messages in-process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import peftkit as pk
from tests.support.command import HANDS, ODD, Ran, entry_point, require_clear_error
from tests.support.files import listing, load, metadata, require_bits, write
from tests.support.hands import full, hand_merge, lora, lycoris_tensors
from tests.support.models import net, state

COMMANDS = (
    "inspect",
    "doctor",
    "diff",
    "plan",
    "merge",
    "export",
    "convert",
    "resize",
    "rescale",
    "combine",
    "extract",
)
WRITERS = ("merge", "export", "convert", "resize", "rescale", "combine", "extract")


# ---------------------------------------------------------------------------------------------- through the entry point


@pytest.mark.processes
def test_inspect_doctor_and_diff_of_a_file_with_an_odd_name(folder: Path) -> None:
    found = entry_point("inspect", folder / ODD)
    assert found.code == 0 and found.err == ""
    assert ODD in found.out and "1 loha" in found.out and "2 lora" in found.out
    assert all(name in found.out for name in ("lycoris_lin", "lycoris_bare", "lycoris_k1"))
    sound = entry_point("doctor", folder / ODD)
    assert (sound.code, sound.out.splitlines()[0], sound.err) == (0, "sound", "")


@pytest.mark.processes
def test_a_stream_that_cannot_show_every_sign_still_gets_the_report(folder: Path) -> None:
    """As Windows gives a program whose output goes into a file."""
    latin = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    ran = entry_point("diff", folder / ODD, folder / "other.safetensors", **latin)
    assert ran.code == 1 and ran.err == ""
    assert "1 modules in both, 0 of them equal" in ran.out and "2 only in the first" in ran.out


@pytest.mark.processes
def test_plan_and_merge_with_strengths_by_number_and_by_rules(folder: Path) -> None:
    rules = folder / "rules.json"
    rules.write_text(json.dumps({"lycoris_l*": -0.5, "bare.weight": 0, "*": 1.5}))
    adapters = (f"{folder / ODD}={rules}", f"{folder / 'other.safetensors'}=0.75")
    planned = entry_point("plan", folder / "base.safetensors", *adapters, "--json").json
    assert {(p["name"], p["strength"], p["kind"]) for p in planned["patches"]} == {
        ("lycoris_lin", -0.5, "lora"),
        ("lycoris_k1", 1.5, "lora"),
        ("lycoris_lin", 0.75, "full"),
    }
    assert set(planned["touched"]) == {"lin.weight", "k1.weight"}
    out = folder / "zusammen ☃.safetensors"
    ran = entry_point("merge", folder / "base.safetensors", *adapters, "-o", out, "--verify")
    assert ran.code == 0 and "merged into 2 weights, 2 changed" in ran.out
    expected = hand_merge(
        state(net()),
        {
            "lin.weight": [(HANDS["lin"], -0.5), (full(12, 8, seed=4), 0.75)],
            "k1.weight": [(HANDS["k1"], 1.5)],
        },
    )
    require_bits(load(out), expected)


@pytest.mark.processes
def test_export_and_convert(folder: Path) -> None:
    exported = entry_point("export", folder / ODD, "-t", "comfyui", "--family", "own", "-o", folder / "c.safetensors")
    assert exported.code == 0 and "for comfyui: 3 weights" in exported.out
    converted = entry_point("convert", folder / ODD, "-k", "lora", "--exact", "-o", folder / "l.safetensors", "--json")
    assert {m["after"].split()[0] for m in converted.json["modules"]} == {"lora"}
    assert pk.diff(folder / ODD, folder / "l.safetensors").equal


@pytest.mark.processes
def test_resize_rescale_and_combine(folder: Path) -> None:
    ran = entry_point("resize", folder / ODD, "--rank", "1", "-o", folder / "r.safetensors")
    assert ran.code == 0 and "lora 1" in ran.out and "3 modules" in ran.out
    ran = entry_point("rescale", folder / ODD, "lycoris_k*=2", "*=0.5", "-o", folder / "s.safetensors")
    assert ran.code == 0, ran.err
    found = pk.diff(folder / ODD, folder / "s.safetensors").distances
    assert sorted(round(d, 5) for d in found.values()) == [0.5, 0.5, 1.0]
    sources = (f"{folder / ODD}=0.5", f"{folder / 'other.safetensors'}=-1")
    ran = entry_point("combine", *sources, "-m", "cat", "-o", folder / "b.safetensors", "--json")
    assert {m["name"] for m in ran.json["modules"]} == {"lycoris_lin", "lycoris_bare", "lycoris_k1"}


@pytest.mark.processes
def test_extract(folder: Path) -> None:
    arguments = (
        folder / "tuned.safetensors",
        folder / "base.safetensors",
        "-k",
        "full",
        "-o",
        folder / "e.safetensors",
    )
    ran = entry_point("extract", *arguments)
    assert ran.code == 0 and "1 weights" in ran.out
    pk.merge_checkpoint(folder / "base.safetensors", {folder / "e.safetensors": 1.0}, folder / "back.safetensors")
    torch.testing.assert_close(load(folder / "back.safetensors"), load(folder / "tuned.safetensors"))


@pytest.mark.processes
def test_an_error_is_one_message_without_a_traceback(folder: Path) -> None:
    before = listing(folder)
    out = folder / "out.safetensors"
    ran = entry_point("merge", folder / "base.safetensors", folder / "tuned.safetensors", "-o", out)
    require_clear_error(ran, "tuned.safetensors", "looks like a checkpoint")
    assert ran.err.startswith("error: ")
    assert listing(folder) == before


# ----------------------------------------------------------------------------------------------------- help and version


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_of_it(command: str, peftkit: Callable[..., Ran]) -> None:
    ran = peftkit(command, "--help")
    assert ran.code == 0 and ran.err == ""
    text = re.sub(r"[\s│]+", " ", ran.out)
    assert f"Example: peftkit {command} " in text
    assert "--json" in text
    assert ("--dry-run" in text and "--out" in text) == (command in WRITERS)


def test_the_help_lists_the_commands_and_the_codes(peftkit: Callable[..., Ran]) -> None:
    ran = peftkit("--help")
    assert ran.code == 0
    assert all(re.search(rf"^│ {command}\s", ran.out, re.MULTILINE) for command in COMMANDS)
    assert peftkit("--version").out.strip() == f"peftkit {pk.__version__}"
    nothing = peftkit()
    assert "Usage: " in nothing.out + nothing.err and "Traceback" not in nothing.err


def test_the_examples_of_the_help_are_commands_that_parse(folder: Path, peftkit: Callable[..., Ran]) -> None:
    """Every example names files that are not there: the message is about one of them, and not about usage."""
    for command in COMMANDS:
        text = re.sub(r"[\s│]+", " ", peftkit(command, "--help").out)
        example = re.search(rf"Example: peftkit ({command} .*?)(?: ╭| &&)", text)
        assert example, text
        ran = peftkit(*example[1].split())
        if command == "doctor":
            assert ran.code == 2 and "there is no file" in ran.out
        else:
            require_clear_error(ran, "there is no file")
            assert "Usage" not in ran.err


# ---------------------------------------------------------------------------------------------------- json and dry runs


def writing(folder: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """A command line of every command that writes."""
    base, file, other = (folder / name for name in ("base.safetensors", ODD, "other.safetensors"))
    return {
        "merge": ("merge", base, f"{file}=0.5", "-o", out),
        "export": ("export", file, "--target", "lycoris", "--out", out),
        "convert": ("convert", file, "--kind", "full", "-o", out),
        "resize": ("resize", file, "--energy", "0.9", "-o", out),
        "rescale": ("rescale", file, "0.5", "-o", out),
        "combine": ("combine", f"{file}=2", other, "-o", out),
        "extract": ("extract", folder / "tuned.safetensors", base, "--rank", "2", "-o", out),
    }


@pytest.mark.parametrize("command", WRITERS)
def test_a_dry_run_says_the_same_and_writes_nothing(command: str, folder: Path, peftkit: Callable[..., Ran]) -> None:
    out = folder / "out.safetensors"
    arguments = writing(folder, out)[command]
    before = listing(folder)
    said = peftkit(*arguments, "--dry-run")
    assert said.code == 0 and said.err == ""
    dry = peftkit(*arguments, "--dry-run", "--json").json
    assert listing(folder) == before
    real = peftkit(*arguments, "--json").json
    assert listing(folder).keys() - before.keys() == {out.name}
    assert all(listing(folder)[name] == data for name, data in before.items())
    if command != "merge":
        assert "dry run: nothing was written" in said.out
        assert dry == real
        assert real["path"] == str(out)
    else:
        assert {p["parts"][0]["weight"] for p in dry["patches"]} == {w["site"] for w in real["weights"]}
    for more in ((), ("--dry-run",)):
        require_clear_error(peftkit(*arguments, *more), "is there already", "--force")
    assert listing(folder)[out.name] != before.get(out.name)
    again = peftkit(*arguments, "--force")
    assert again.code == 0 and again.out.endswith(f"wrote {out}\n")


def test_json_carries_the_numbers_of_the_reports(folder: Path, peftkit: Callable[..., Ran]) -> None:
    file, other, base = folder / ODD, folder / "other.safetensors", folder / "base.safetensors"
    inspected, found = peftkit("inspect", file, "--json").json, pk.inspect(file)
    assert [m["norm"] for m in inspected["modules"]] == [m.norm for m in found.modules]
    assert [(m["kind"], m["rank"], m["scale"]) for m in inspected["modules"]] == [
        (m.kind, m.rank, m.scale) for m in found.modules
    ]
    assert inspected["loads"] == found.loads
    assert peftkit("doctor", file, "--json").json["code"] == 0
    difference = peftkit("diff", file, other, "--json")
    assert difference.code == 1
    assert json.loads(difference.out)["distances"] == pk.diff(file, other).distances
    out = folder / "out.safetensors"
    report = pk.merge_checkpoint(base, {file: 0.5}, out)
    merged = peftkit("merge", base, f"{file}=0.5", "-o", out, "--json", "--force").json
    assert [(w["site"], w["norm"], w["change"], w["lost"]) for w in merged["weights"]] == [
        (w.site, w.norm, w.change, w.lost) for w in report.weights
    ]
    resized, resize = (
        peftkit("resize", file, "--rank", 1, "-o", out, "--json", "--force").json,
        pk.resize(file, out, rank=1),
    )
    assert [m["error"] for m in resized["modules"]] == [m.error for m in resize.modules]
    extracted = peftkit("extract", folder / "tuned.safetensors", base, "--rank", 2, "-o", out, "--json", "--force").json
    extraction = pk.extract(folder / "tuned.safetensors", base, out, rank=2)
    assert [(w["weight"], w["lost"]) for w in extracted["weights"]] == [(w.weight, w.lost) for w in extraction.weights]


def test_json_is_all_that_is_on_stdout_and_has_no_number_json_lacks(folder: Path, peftkit: Callable[..., Ran]) -> None:
    dead = write(
        folder / "dead.safetensors",
        {k: t * 0 if "up" in k else t for k, t in lycoris_tensors({"lin": lora(12, 8)}).items()},
    )
    ran = peftkit("diff", dead, folder / "other.safetensors", "--json")
    strict = json.loads(ran.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(strict["distances"].values()) == {"inf"}


# ------------------------------------------------------------------------------------------------------- options, codes


def test_doctor_exits_with_what_it_found(folder: Path, peftkit: Callable[..., Ran]) -> None:
    tensors = lycoris_tensors(HANDS)
    dead = {**tensors, "lycoris_lin.lora_up.weight": torch.zeros(12, 4)}
    part = write(folder / "part.safetensors", dead)
    ran = peftkit("doctor", part)
    assert ran.code == 1 and "usable in part" in ran.out and "lycoris_lin" in ran.out
    broken = write(
        folder / "broken.safetensors", {**tensors, "lycoris_lin.lora_up.weight": torch.full((12, 4), torch.nan)}
    )
    (folder / "noise.safetensors").write_bytes(b"noise")
    for file in (broken, folder / "noise.safetensors", folder / "nothing.safetensors", folder):
        ran = peftkit("doctor", file)
        assert ran.code == 2 and "not usable" in ran.out and ran.err == ""
        ran = peftkit("doctor", file, "--json")
        assert ran.code == 2 and json.loads(ran.out)["code"] == 2


def test_diff_exits_with_0_for_the_same_change(folder: Path, peftkit: Callable[..., Ran]) -> None:
    pk.convert(folder / ODD, folder / "full.safetensors", "full")
    ran = peftkit("diff", folder / ODD, folder / "full.safetensors")
    assert ran.code == 0 and "3 modules in both, 3 of them equal" in ran.out


@pytest.mark.parametrize("name", [ODD, "a=b.safetensors", "a b.safetensors", "=.safetensors", "ü.safetensors", "x=1"])
@pytest.mark.parametrize("strength", ["", "=0.5", "=-1", "=1e-1"])
def test_a_strength_is_told_from_a_name(
    name: str, strength: str, folder: Path, peftkit: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    write(folder / name, lycoris_tensors({"lin": full(12, 8)}))
    (patch,) = peftkit("plan", "base.safetensors", f"{name}{strength}", "--json").json["patches"]
    assert patch["file"] == name
    assert patch["strength"] == float(strength[1:] or 1)


@pytest.mark.parametrize("where", ["rules.json", "lr=1e-4 ☃/rules.json", "a=b.json"])
def test_rules_are_read_from_wherever_they_are(where: str, folder: Path, peftkit: Callable[..., Ran]) -> None:
    path = folder / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"lycoris_lin": 0.25, "*": -1}))
    planned = peftkit("plan", folder / "base.safetensors", f"{folder / ODD}={path}", "--json").json
    assert {p["name"]: p["strength"] for p in planned["patches"]}["lycoris_lin"] == 0.25


@pytest.mark.parametrize(
    "rules", ['{"*": "much"}', '{"*": null}', '{"*": [1]}', "[]", "1", "{", '{"no such": 1}', "{}"]
)
def test_rules_that_are_none_are_refused(rules: str, folder: Path, peftkit: Callable[..., Ran]) -> None:
    (folder / "rules.json").write_text(rules)
    before = listing(folder)
    out = folder / "out.safetensors"
    ran = peftkit("merge", folder / "base.safetensors", f"{folder / ODD}={folder / 'rules.json'}", "-o", out)
    require_clear_error(ran)
    assert listing(folder) == before


BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no command": (("merg",), ("merg",)),
    "no such option": (("inspect", "{odd}", "--no-such"), ("--no-such",)),
    "no file named": (("inspect",), ("file",)),
    "no out": (("convert", "{odd}", "-k", "lora"), ("--out",)),
    "no such file": (("inspect", "nothing.safetensors"), ("there is no file nothing.safetensors",)),
    "no such base": (("plan", "nothing.safetensors", "{odd}"), ("there is no file nothing.safetensors",)),
    "no such adapter": (("plan", "base.safetensors", "no=thing.safetensors"), ("no=thing.safetensors",)),
    "no such kind": (("convert", "{odd}", "-k", "lorra", "-o", "o.safetensors"), ("Did you mean 'lora'",)),
    "no such target": (("export", "{odd}", "-t", "comfy", "-o", "o.safetensors"), ("comfyui",)),
    "no such dtype": (("resize", "{odd}", "--rank", "1", "--dtype", "int8", "-o", "o.safetensors"), ("fp32", "bf16")),
    "no such method": (("combine", "{odd}", "other.safetensors", "-m", "tie", "-o", "o.safetensors"), ("ties",)),
    "no such rebase": (("plan", "base.safetensors", "{odd}", "--rebase", "x"), ("transplant",)),
    "no number": (("plan", "base.safetensors", "other.safetensors=much"), ("much",)),
    "no finite number": (("plan", "base.safetensors", "other.safetensors=nan"), ("nan",)),
    "twice the same": (("plan", "base.safetensors", "other.safetensors", "other.safetensors=2"), ("twice",)),
    "no integer": (("resize", "{odd}", "--rank", "two", "-o", "o.safetensors"), ("rank",)),
    "no share": (("resize", "{odd}", "--energy", "2", "-o", "o.safetensors"), ("energy",)),
    "nothing to keep": (("resize", "{odd}", "-o", "o.safetensors"), ("rank, energy and threshold",)),
    "rules for combine": (("combine", "{odd}=rules.json", "other.safetensors", "-o", "o.safetensors"), ("number",)),
    "one to combine": (("combine", "{odd}", "-o", "o.safetensors"), ("two",)),
    "lossy but exact": (("convert", "{odd}", "-k", "lokr", "--exact", "-o", "o.safetensors"), ("would differ",)),
    "a pickle by name": (("merge", "base.safetensors", "{odd}", "-o", "o.ckpt"), ("safetensors",)),
    "nowhere to write": (("rescale", "{odd}", "2", "-o", "nowhere/o.safetensors"), ("no folder",)),
    "the same model": (("extract", "base.safetensors", "base.safetensors", "--rank", "1", "-o", "o.safetensors"), ()),
    "no place": (("merge", "base.safetensors", "wrong.safetensors", "-o", "o.safetensors"), ("wrong.safetensors",)),
    "a folder": (("inspect", "."), ("adapter_config.json",)),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_clear_message_and_code_2(
    bad: str, folder: Path, peftkit: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "rules.json").write_text('{"*": 1}')
    write(folder / "wrong.safetensors", lycoris_tensors({"lin": lora(12, 9), "nowhere": lora(2, 2)}))
    before = listing(folder)
    arguments, words = BAD[bad]
    ran = peftkit(*(argument.replace("{odd}", ODD) for argument in arguments))
    require_clear_error(ran, *words)
    assert listing(folder) == before


def test_a_negative_factor_is_a_factor(folder: Path, peftkit: Callable[..., Ran]) -> None:
    out = folder / "out.safetensors"
    ran = peftkit("rescale", folder / ODD, "-0.5", "-o", out)
    assert ran.code == 0, ran.err
    assert {round(d, 6) for d in pk.diff(folder / ODD, out).distances.values()} == {1.5}


def test_options_reach_the_functions(folder: Path, peftkit: Callable[..., Ran]) -> None:
    base, file, out = folder / "base.safetensors", folder / ODD, folder / "out.safetensors"
    assert peftkit("merge", base, file, "-o", out, "--dtype", "bf16", "--force").code == 0
    assert {t.dtype for t in load(out).values() if t.is_floating_point()} == {torch.bfloat16}
    assert peftkit("convert", file, "-k", "full", "-o", out, "--dtype", "fp16", "--force").code == 0
    assert {t.dtype for t in load(out).values()} == {torch.float16}
    stray = write(folder / "stray.safetensors", {**lycoris_tensors(HANDS), "epoch": torch.ones(1)})
    require_clear_error(peftkit("plan", base, stray), "ignore")
    assert peftkit("plan", base, stray, "--ignore", "epo*").code == 0
    torch.save(state(net()), folder / "base.ckpt")
    require_clear_error(peftkit("plan", folder / "base.ckpt", file), "pickle")
    assert peftkit("plan", folder / "base.ckpt", file, "--allow-pickle").code == 0
    both = (f"{file}=0.5", f"{folder / 'other.safetensors'}=0.5")
    for seed in (1, 2):
        target = folder / f"{seed}.safetensors"
        options = ("-m", "dare", "--density", "0.5", "--seed", seed, "-o", target)
        assert peftkit("combine", *both, *options).code == 0
    assert (
        load(folder / "1.safetensors")["lycoris_lin.diff"].ne(load(folder / "2.safetensors")["lycoris_lin.diff"]).any()
    )
    assert "lycoris_lin" not in peftkit("inspect", file, "--no-modules").out
    exported = peftkit("export", file, "-t", "comfyui", "--family", "own", "-o", out, "--title", "Ein Titel", "--force")
    assert exported.code == 0 and any("Ein Titel" in value for value in metadata(out).values())
    some = peftkit(
        "extract", folder / "tuned.safetensors", base, "--rank", 1, "--targets", "lin*", "-o", out, "--json", "--force"
    )
    assert [w["weight"] for w in some.json["weights"]] == ["lin"]


def test_another_base_needs_to_be_accepted_or_transplanted_from(folder: Path, peftkit: Callable[..., Ran]) -> None:
    model = net()
    pk.wrap(model, "ia3", targets=["lin"])
    with torch.no_grad():
        model.lin.adapters["default"].gate.fill_(0.5)
    own = pk.save(model, folder / "own.safetensors")
    moved = {k: t * 2 if t.is_floating_point() else t for k, t in state(net()).items()}
    other, out = write(folder / "moved.safetensors", moved), folder / "out.safetensors"
    require_clear_error(peftkit("merge", other, own, "-o", out), "another base", "--other-base")
    assert not out.exists()
    W = state(net())["lin.weight"]
    assert peftkit("merge", other, own, "-o", out, "--other-base").code == 0
    torch.testing.assert_close(load(out)["lin.weight"], 3 * W)
    origin = ("--rebase", "transplant", "--origin", folder / "base.safetensors")
    assert peftkit("merge", other, own, "-o", out, "--force", *origin).code == 0
    torch.testing.assert_close(load(out)["lin.weight"], 2.5 * W)
    planned = peftkit("plan", other, own, *origin)
    assert planned.code == 0 and "transplant" in planned.out and "100 %" in planned.out


def test_a_folder_of_peft_goes_in_and_out(folder: Path, peftkit: Callable[..., Ran]) -> None:
    out = folder / "peft folder ☃"
    assert peftkit("export", folder / ODD, "-t", "peft", "-o", out, "--base", folder / "base.safetensors").code == 0
    assert {p.name for p in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "peft file" in peftkit("inspect", out).out
    assert peftkit("diff", folder / ODD, out, "--base", folder / "base.safetensors").code == 0
    require_clear_error(peftkit("resize", out, "--rank", 1, "-o", out), "one of the inputs", "--force")
    assert peftkit("resize", out, "--rank", 1, "-o", folder / "small", "--dry-run").code == 0
    assert not (folder / "small").exists()


@pytest.mark.processes
def test_monitor_draws_and_tells(tmp_path: Path, peftkit: Callable[..., Ran]) -> None:
    """A log becomes a picture, and is judged again by other windows."""
    log = tmp_path / "run.jsonl"
    model = torch.nn.Linear(8, 8)
    pk.wrap(model, "lora", rank=2)
    stopper = pk.monitor.EarlyStopping(model, interval=1, window=3, log=log)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        with torch.no_grad():
            for parameter in pk.adapter_parameters(model):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        stopper.step(lr=1e-3)
        if step % 20 == 19:
            stopper.note(validation=float(step))
    assert f"turning point at step {stopper.advice.step}" in peftkit("monitor", "show", log).out
    plain = peftkit("monitor", "show", log, "--json").json
    assert plain["turning_point"] == stopper.advice.step
    assert plain["valleys"] == list(stopper.advice.valleys)
    other = peftkit("monitor", "show", log, "--window", 4, "--mode", "paper", "--json").json
    rule = pk.monitor.SecondValley(4, mode="paper")
    for row in stopper.rows:
        if row.cs is not None:
            rule.push(row.cs, row.lr)
    assert rule.found is not None
    assert other["turning_point"] == rule.found.measurement + 1
    assert peftkit("monitor", "show", log, "--window", 40).code == 1
    assert entry_point("monitor", "plot", log).code == 0
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    assert peftkit("monitor", "plot", log, "-o", tmp_path / "run.svg").code == 0
    for wrong in (["plot", log, "-o", tmp_path / "run.xyz"], ["show", tmp_path / "none.jsonl"]):
        require_clear_error(peftkit("monitor", *wrong), str(wrong[-1]))
