"""The shell scripts: their arguments, their messages, what they start, and whose exit status they return."""

import ast
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"
EXAMPLES = ROOT / "scripts" / "examples" / "glm32k"
CONFIGS = ROOT / "research" / "glm32k"
SHELL_SCRIPTS = [LAUNCHER, *sorted(EXAMPLES.glob("*.sh")), ROOT / ".ci" / "run"]

# Takes the place of msrun: writes its arguments down, and a failed job's logs where FAIL_RANK says which worker failed.
FAKE_MSRUN = """#!/bin/bash
printf '%s\\n' "$@" > msrun_arguments
if [[ -n ${FAIL_RANK:-} ]]; then
    echo "error: the disk is full" > "$LOGS/worker_$FAIL_RANK.log"
    echo "[INFO] DISTRIBUTED note that comes last" >> "$LOGS/worker_$FAIL_RANK.log"
    echo "step 7" > "$LOGS/worker_$((1 - FAIL_RANK)).log"
fi
exit ${STATUS:-0}
"""


@pytest.fixture
def environment(tmp_path):
    """Environment variables in which `msrun` is the fake one and `python` is this one; no log suffixes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "msrun").write_text(FAKE_MSRUN)
    (folder / "msrun").chmod(0o755)
    (folder / "python").write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MF_LOG_SUFFIX", "LOG_MF_PATH", "PLOG_REDIRECT_TO_OUTPUT")
    }
    return {**kept, "PATH": f"{folder}:/usr/bin:/bin"}


def bash(script, *arguments, timeout=600, **options):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
        **options,
    )


def launched():
    """(msrun's own options as a dict, the command behind them as a list)"""
    words = Path("msrun_arguments").read_text().splitlines()
    first = next(index for index, word in enumerate(words) if not word.startswith("--"))
    return dict(word[2:].split("=", 1) for word in words[:first]), words[first:]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script):
    assert os.access(script, os.X_OK)
    done = bash("-n", script)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", [LAUNCHER, *sorted(EXAMPLES.glob("*.sh"))], ids=lambda path: path.name)
def test_help_goes_to_stdout(script):
    done = bash(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage")


# ---- msrun_launcher.sh


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((), {"worker_num": "8", "local_worker_num": "8", "master_port": "8118", "join": "True"}),
        ((2,), {"worker_num": "2", "local_worker_num": "2", "log_dir": "output/msrun_log", "cluster_time_out": "7200"}),
        (
            (4, 8200, "logs", "False", 60),
            {
                "worker_num": "4",
                "local_worker_num": "4",
                "master_port": "8200",
                "log_dir": "logs",
                "join": "False",
                "cluster_time_out": "60",
            },
        ),
        (
            (16, 8, "10.0.0.1", 8200, 1, "logs", "true", 60),
            {
                "worker_num": "16",
                "local_worker_num": "8",
                "master_addr": "10.0.0.1",
                "master_port": "8200",
                "node_rank": "1",
                "log_dir": "logs",
                "join": "True",
                "cluster_time_out": "60",
            },
        ),
    ],
)
def test_launcher_passes_upstreams_positional_arguments_to_msrun(environment, arguments, options):
    done = bash(LAUNCHER, "run_mindformer.py --config a.yaml", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    given, command = launched()
    assert options.items() <= given.items()
    assert ("node_rank" in given) == (len(arguments) == 8)  # one machine numbers its workers itself
    assert command == ["python", "-m", "mindformers_glm32k.run_mindformer", "--config", "a.yaml"]


def test_launcher_takes_the_run_mindformer_of_the_current_folder(environment):
    Path("run_mindformer.py").write_text("print('mine')\n")
    assert bash(LAUNCHER, "run_mindformer.py --x 1", 2, env=environment).returncode == 0
    assert launched()[1] == ["python", "run_mindformer.py", "--x", "1"]


def test_launcher_respects_quotes_and_drops_a_leading_python(environment):
    order = """python run_mindformer.py --predict_data 'two words' "it's" \\\n --epochs 1"""
    assert bash(LAUNCHER, order, 2, env=environment).returncode == 0
    assert launched()[1][3:] == ["--predict_data", "two words", "it's", "--epochs", "1"]


def test_launcher_runs_a_single_process_without_msrun(environment):
    Path("run_mindformer.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    done = bash(LAUNCHER, "run_mindformer.py --a b", 1, env=environment)
    assert done.returncode == 7 and "['--a', 'b']" in done.stdout
    assert not Path("msrun_arguments").exists()


@pytest.mark.parametrize("failed", [0, 1])
def test_launcher_returns_the_jobs_status_and_shows_the_failing_workers_log(environment, failed):
    environment.update(STATUS="3", FAIL_RANK=str(failed), LOGS="output/msrun_log")
    done = bash(LAUNCHER, "run_mindformer.py", 2, env=environment)
    assert done.returncode == 3
    assert f"worker_{failed}.log" in done.stderr and "error: the disk is full" in done.stderr
    assert "comes last" not in done.stderr and "step 7" not in done.stderr


def test_launcher_does_not_blame_logs_of_an_earlier_job(environment):
    Path("output/msrun_log").mkdir(parents=True)
    old = Path("output/msrun_log/worker_0.log")
    old.write_text("Traceback (most recent call last)\n")
    os.utime(old, (1, 1))
    done = bash(LAUNCHER, "run_mindformer.py", 2, env={**environment, "STATUS": "1"})
    assert done.returncode == 1 and "Traceback" not in done.stderr and "killed from outside" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "1, 2, 6 or 9 arguments are needed, got 0"),
        (("run_mindformer.py", 2, 8118), "got 3"),
        (("run_mindformer.py", "two"), "WORKER_NUM is 'two'"),
        (("run_mindformer.py", 0), "WORKER_NUM is '0'"),
        (("run_mindformer.py", 2, 80, "logs", "True", 60), "MASTER_PORT is '80'"),
        (("run_mindformer.py", 2, 8118, "logs", "maybe", 60), "JOIN is 'Maybe'"),
        (("run_mindformer.py", 8, 9, "10.0.0.1", 8118, 0, "logs", "True", 60), "LOCAL_WORKER is '9'"),
        (("run_mindformer.py 'x", 2), "quotes"),
        (("", 2), "first argument is empty"),
        (("train.py", 2), "train.py: no such file"),
    ],
)
def test_launcher_names_what_is_wrong(environment, arguments, message):
    done = bash(LAUNCHER, *arguments, env=environment)
    assert done.returncode == 2 and message in done.stderr
    assert not Path("msrun_arguments").exists()


def test_launcher_says_when_the_port_is_taken(environment):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = bash(LAUNCHER, "run_mindformer.py", 2, port, "logs", "True", 60, env=environment)
    assert done.returncode == 2 and f"MASTER_PORT {port} is taken" in done.stderr


def test_launcher_says_when_msrun_is_missing(environment):
    Path("bin/msrun").unlink()
    done = bash(LAUNCHER, "run_mindformer.py", 2, env=environment)
    assert done.returncode == 2 and "no msrun on PATH" in done.stderr


# ---- run_glm32k_predict.sh


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "got 0 arguments"),
        (("a.yaml", "b.ckpt"), "got 2 arguments"),
        (("nowhere.yaml", "b.ckpt", "tokenizer.model"), "--config nowhere.yaml: no such file"),
    ],
)
def test_predict_names_what_is_wrong(environment, arguments, message):
    done = bash(EXAMPLES / "run_glm32k_predict.sh", *arguments, env=environment)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory):
    """A checkpoint of random weights for predict_glm32k_tiny_cpu.yaml."""
    import mindspore
    from mindformers import MindFormerConfig

    from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration

    mindspore.set_seed(1)
    settings = dict(MindFormerConfig(str(CONFIGS / "predict_glm32k_tiny_cpu.yaml")).model.model_config)
    settings.pop("type")
    path = tmp_path_factory.mktemp("random") / "random.ckpt"
    mindspore.set_context(device_target="CPU")
    mindspore.save_checkpoint(GLM32KForConditionalGeneration(GLM32KConfig(**settings)), str(path))
    return path


def test_predict_prints_answers_alone(environment, random_checkpoint, small_vocab_file):
    Path("prompts.txt").write_text("".join(f"prompt number {number}\n" for number in range(5)))
    done = bash(
        EXAMPLES / "run_glm32k_predict.sh",
        CONFIGS / "predict_glm32k_tiny_cpu.yaml",
        random_checkpoint,
        small_vocab_file,
        "prompts.txt",
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    batches = ast.literal_eval(Path("output/predict/text_generation_result.txt").read_text())
    answers = [answer for batch in batches for answer in batch["text_generation_text"]]
    assert len(answers) == 5 and len(batches) > 1
    assert done.stdout == "".join(answer + "\n" for answer in answers)
    assert "Predict Over" in Path("output/predict/predict.log").read_text()
    assert "5 answers" in done.stderr and "INFO" not in done.stderr


# ---- quickstart.sh


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--venv",), "--venv needs a folder"),
        (("--fast",), "unknown option --fast"),
        (("one", "two"), "one OUTPUT_DIR, got also two"),
    ],
)
def test_quickstart_names_what_is_wrong(arguments, message):
    done = bash(EXAMPLES / "quickstart.sh", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_quickstart_does_not_build_over_something_else():
    Path("papers").mkdir()
    Path("papers/thesis.txt").write_text("mine")
    done = bash(EXAMPLES / "quickstart.sh", "out", "--venv", "papers")
    assert done.returncode == 1 and "stage 1/6: papers has no bin/python and is not empty" in done.stderr


def test_quickstart_replaces_no_files_but_its_own():
    Path("mine/checkpoint").mkdir(parents=True)
    done = bash(EXAMPLES / "quickstart.sh", "mine")
    assert done.returncode == 2 and "mine is not empty and not from an earlier quickstart" in done.stderr
    assert [path.name for path in Path("mine").iterdir()] == ["checkpoint"]


def test_quickstart_stops_at_the_first_stage_that_fails():
    """An environment whose python finds every package and then fails."""
    python = Path("venv/bin/python")
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\n[[ $1 == -c ]] && { echo pair; exit 0; }\necho 'no space left'\nexit 9\n")
    python.chmod(0o755)
    done = bash(EXAMPLES / "quickstart.sh", "out", "--venv", "venv")
    assert done.returncode == 1
    assert "error: stage 3/6: make-data; log: " in done.stderr and "no space left" in done.stderr
    assert Path("out/logs/make_data.log").read_text() == "no space left\n"
    assert "4/6" not in done.stdout


@pytest.mark.slow
def test_quickstart_trains_a_model_that_answers():
    if not Path(sys.prefix, "bin", "python").exists():
        pytest.skip(f"{sys.prefix} has no bin/python to give to --venv")
    # on cores that other programs use too, 500 steps take longer than the 600 seconds of the other scripts
    done = bash(EXAMPLES / "quickstart.sh", "out", "--venv", sys.prefix, timeout=1700)
    assert done.returncode == 0, done.stderr
    right, questions = map(int, re.search(r"(\d+) of (\d+) held-out answers are right", done.stdout).groups())
    assert right > questions / 4  # a guess is right far less often
    losses = [float(line.split(",")[1]) for line in Path("out/loss_curve.csv").read_text().splitlines()[1:]]
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
    assert Path("out/loss_curve.png").stat().st_size > 0
    assert list(Path("out/checkpoint/rank_0").glob("*.ckpt"))
    assert len(Path("out/answers.txt").read_text().splitlines()) == questions
    assert "fine-tuned scores +" in done.stdout and "beyond what chance gives" in done.stdout
    report = Path("out/report.md").read_text(encoding="utf-8")
    assert "random weights" in report and "sha256:" in report, "how both were made"
    assert "<h2>Other data sets</h2>" in Path("out/report.html").read_text(encoding="utf-8")
