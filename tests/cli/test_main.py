"""The command line as a user meets it: tables, help, and bad input in one line with exit code 2."""

import csv
import json

import pytest
import yaml
from ranks import ROOT, sparse_gpt

NOVEL = ROOT / "data/novels/persuasion.txt"


def test_bad_input_ends_a_real_command_with_one_line():
    done = sparse_gpt("train", "configs/tiny-dense.yaml", "model.n_layr=3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: configs/tiny-dense.yaml: model.n_layr: unknown key")
    assert done.stderr.count("\n") == 1


def test_flops_of_the_papers_ffn_are_the_published_ones(command):
    done = command("flops", "configs/tiny-paper.yaml", "--json")
    ffn = json.loads(done.stdout)["ffn"]
    assert ffn["parts"] == {
        "norms": 1_024,
        "spectral": 9_984,
        "polynomial": 15_104,
        "refine": 2_048,
        "projection": 16_384,
    }
    assert (ffn["total"], ffn["dense"]) == (44_544, 131_072)
    assert ffn["dense_activation_flops"] > 0


def test_flops_tell_parameters_from_those_of_a_token(command):
    found = json.loads(command("flops", "configs/tiny-sparse.yaml", "--json").stdout)
    ours, dense = found["parameters"], found["dense_parameters"]
    assert ours["dictionaries"] == 4 * 64 * 2 * 64 * 128
    assert ours["total"] - ours["active"] == ours["dictionaries"] * 62 // 64
    assert ours["active_without_embeddings"] < dense["active_without_embeddings"]
    assert dense["total"] == dense["active"]
    table = " ".join(command("flops", "configs/tiny-sparse.yaml").stdout.split())
    said = f"{ours['total']:,} parameters, {ours['active']:,} of them active for a token"
    assert f"{said}; dense: {dense['total']:,} parameters." in table


def test_flops_table_shows_blocks_components_and_what_is_saved(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    done = command("flops", "configs/tiny-paper.yaml")
    assert done.returncode == 0
    for text in ("blocks 0 to 3, each", "spectral", "44,544", "131,072", "model without logits"):
        assert text in done.stdout


def test_prepare_then_info_then_verify_then_damage(command, tmp_path):
    out = tmp_path / "novels"
    arguments = ("prepare", NOVEL, "--separator", "\nChapter ", "--held-out", "0.2", "--out", out)
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    info = json.loads(command("shards", "info", out, "--json").stdout)
    assert (
        info["train"]["documents"] + info["held_out"]["documents"] == 25
    )  # title page, 24 chapters
    assert command("shards", "verify", out).returncode == 0

    shard = max(out.rglob("*.bin"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 4
    shard.write_bytes(data)
    damaged = command("shards", "verify", out)
    assert damaged.returncode == 1
    assert shard.name in damaged.stdout + damaged.stderr
    assert "block 0" in damaged.stdout + damaged.stderr


def test_export_then_import_then_verify(command, refused, tmp_path):
    ours, theirs, back = (tmp_path / name for name in ("ours", "theirs", "back"))
    arguments = ("prepare", NOVEL, "--separator", "\nChapter ", "--held-out", "0.2", "--out", ours)
    assert command(*arguments).returncode == 0
    done = command("shards", "export", ours, "--format", "nanogpt", "--out", theirs)
    assert done.stdout.split() == [str(theirs / "train.bin"), str(theirs / "val.bin")], done.stderr
    files = (theirs / "train.bin", "--held-out", theirs / "val.bin")
    importing = ("shards", "import", *files, "--format", "nanogpt", "--out", back)
    done = command(*importing, "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    before = json.loads(command("shards", "info", ours, "--json").stdout)
    after = json.loads(done.stdout)
    assert (after["train"], after["held_out"]) == (before["train"], before["held_out"])
    assert command("shards", "verify", back).returncode == 0
    shards = ("shards", "import", *files, "--out", tmp_path / "other")
    assert "train.bin: not a token file of llm.c" in refused(*shards, "--format", "llmc")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("absent.txt", None, [], "absent.txt"),
        ("empty.txt", "", [], "empty"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', [], "broken.jsonl:2"),
        ("fields.jsonl", '{"text": "a"}\n{"body": "b"}\n', [], "fields.jsonl:2"),
        ("type.jsonl", '{"text": 5}\n', [], "type.jsonl:1"),
    ],
)
def test_prepare_refuses_bad_input_and_leaves_nothing(
    refused, tmp_path, name, text, options, message
):
    if text is not None:
        (tmp_path / name).write_text(text)
    out = tmp_path / "out"
    assert message in refused("prepare", tmp_path / name, "--out", out, *options)
    assert not out.exists()


def test_train_refuses_bad_input_and_leaves_nothing(refused, run_file, tmp_path):
    def train(*overrides):
        return refused("train", run_file, *overrides)

    assert "did you mean 'n_layer'" in train("model.n_layrs=3")
    assert "should be a valid number" in train("optimizer.lr=fast")
    assert "possible values: 1, 2, 4, 8, 16" in train("batch.micro_batch=3")
    assert "possible ranks: 1, 2, 4" in train("--devices", "3")
    assert "absent" in train(f"data.path={tmp_path / 'absent'}")
    assert "model.vocab_size" in train("model.vocab_size=50000")
    assert "fp16 needs a GPU" in train("precision=fp16")
    assert "model.ffn.backend: unknown key" in train("model.ffn.backend=triton")
    long = "model.max_seq_len=1000000"
    assert "1000000" in train(long, "batch={global_tokens: 1000000, micro_batch: 1}")
    assert not (tmp_path / "run").exists()


def test_train_refuses_more_ranks_than_samples(command, refused, run_file, tmp_path):
    (tmp_path / "short.txt").write_text("Some words of a very short story. " * 40)
    out = tmp_path / "short"
    done = command("prepare", tmp_path / "short.txt", "--held-out", "0", "--out", out)
    assert done.returncode == 0, done.stderr
    message = refused(
        *("train", run_file, "--devices", "16", f"data.path={out}"),
        *("batch.micro_batch=1", "model.vocab_size=50257"),
    )
    assert "16" in message
    assert not (tmp_path / "run").exists()


def write_run(run, ffn, *steps):
    """A run's record: a first validation, and then these rows."""
    run.mkdir(parents=True)
    tree = yaml.safe_load((ROOT / "configs/tiny-dense.yaml").read_text())
    tree["model"]["ffn"] = ffn
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = [{"step": 0, "gflops": 0, "val/loss": 10.8}, *steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_compare_puts_runs_side_by_side(command, refused, tmp_path):
    for name, ffn, speed in (("dense", "dense", 100.0), ("sparse", "default", 150.0)):
        step = {"step": 1, "gflops": 5.0, "val/loss": 7.0, "perf/tokens_per_second": speed}
        write_run(tmp_path / name, ffn, step)
    done = command("compare", tmp_path / "dense", tmp_path / "sparse", "--json")
    found = list(json.loads(done.stdout).values())
    assert [run["ffn_macs"] for run in found] == [131_072, 58_304]
    assert [run["validation_loss"] for run in found] == [7.0, 7.0]
    table = command("compare", tmp_path / "dense", tmp_path / "sparse").stdout
    assert "1.500" in table
    assert "0.445" in table  # 58,304 over 131,072
    dense, sparse = found
    assert dense["parameters"] == dense["active_parameters"]
    idle = 4 * (64 - 2) * 2 * 64 * 128  # layers, blocks, analysis and synthesis
    assert sparse["parameters"] - sparse["active_parameters"] == idle
    assert "active for a token" in table
    (tmp_path / "empty").mkdir()
    assert "holds no metrics.jsonl" in refused("compare", tmp_path / "empty")


def test_compare_lists_a_sweep_with_names_whole_and_what_ended_in_nan(command, tmp_path):
    sweep, stem = tmp_path / "sweep", "sparse-d1024-lr0.002-s0-with-a-long-name-3e"
    for power, loss in ((18, 3.5), (19, 3.0), (20, None), (21, 3.25)):
        step = {"step": 1, "gflops": 10.0**power / 1e9, "perf/tokens_per_second": 5.0}
        step |= {"train/loss": loss, "val/loss": 4.0 if loss is None else loss}
        write_run(sweep / "runs" / f"{stem}{power}", "dense", step)
    write_run(sweep / "runs/not-begun", "dense")
    shown = command("compare", sweep, "--sort", "loss").stdout
    lines = shown.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["3.0000", "3.2500", "3.5000", "NaN"]
    assert [line.split()[0] for line in lines[1:]] == [f"{stem}{p}" for p in (19, 21, 18, 20)]
    rows = list(csv.DictReader(command("compare", sweep, "--csv").stdout.splitlines()))
    assert [row["validation_loss"] for row in rows] == ["3.5", "3.0", "nan", "3.25"]
    assert rows[0]["run"] == str(sweep / "runs" / f"{stem}18")


def test_options_that_contradict_each_other_are_refused(command, run_file, tmp_path):
    for options in (
        ["--slurm"],
        ["--slurm", "--devices", "1", "--restarts", "1"],
        ["--nodes", "2"],
        ["--devices", "1", "--hostfile", str(tmp_path)],
    ):
        done = command("train", run_file, *options)
        assert done.returncode == 2
        assert done.stderr.startswith("error: --")
        assert done.stderr.count("\n") == 1
