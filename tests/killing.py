"""Kill a job at each of its steps: `python killing.py JOB FOLDER` prints in what state every kill left things.

The job runs in a fork, which ends itself with SIGKILL before its n-th operation on files, n = 0, 1, ... until it ends
by itself; or, for a push, which the Hub kills at its n-th request.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree", "ctypes.dlsym"}


def fork() -> int:
    """A fork that says where it hangs, if it does."""
    pid = os.fork()
    if not pid:
        faulthandler.dump_traceback_later(120, exit=True)
    return pid


def forked(job: Callable[[], None], at: int | None) -> bool:
    """Run `job` in a fork that is killed before its operation `at`; whether it was."""
    pid = fork()
    if not pid:
        count = [0]

        def watch(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in EVENTS or writes:
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1

        sys.addaudithook(watch)
        try:
            job()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the job failed")
    return os.WIFSIGNALED(status)


def at_random(job: Callable[[], None], seconds: float) -> bool:
    """The same, killed after a time."""
    pid = fork()
    if not pid:
        job()
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def state(folder: Path) -> list:
    """The degree of the activations, the names of the files, and the hash of the weights; reading all of them."""
    from orthoact.convert.folder import read_activations, read_report

    acts = read_activations(folder)
    assert acts and (read_report(folder) or (folder / "adapter_config.json").is_file())
    weights = next(folder.glob("*.safetensors")).read_bytes()
    return [
        next(iter(acts.values())).degree,
        sorted(p.name for p in folder.iterdir()),
        sha256(weights).hexdigest(),
    ]


def saving(root: Path, form: str) -> dict:
    import orthoact
    from orthoact.convert.checkpoint import save
    from orthoact.convert.sources import load_source

    sources = {}
    for degree in (4, 6):
        sources[degree] = load_source("demo")
        orthoact.convert_(sources[degree].model, degree=degree)

    def job(degree):
        source = sources[degree]
        save(source.model, root / "out", source=source, form=form, overwrite=True, page=form == "full")

    job(6)
    new = state(root / "out")
    began = time.perf_counter()
    job(4)
    took, old = time.perf_counter() - began, state(root / "out")
    left, times = {"old": 0, "new": 0}, random.Random(0)

    def check(killed: bool) -> bool:
        found = state(root / "out")
        assert found in (old, new), found
        left["old" if found == old else "new"] += killed
        if found == new:
            job(4)  # begin again
        return killed

    step = 0
    while check(forked(lambda: job(6), step)):
        step += 1
    for _ in range(8):
        check(at_random(lambda: job(6), times.uniform(0, took)))
    job(4)
    return {**left, "beside": sorted(p.name for p in root.iterdir())}


def converting(root: Path) -> dict:
    from orthoact.cli import main

    def job(degree):
        arguments = ["convert", "demo", "-o", str(root / "out"), "--degree", degree, "--overwrite", "--quiet"]
        main(arguments, standalone_mode=False)

    job("6")
    new = state(root / "out")
    job("4")
    old, left, step, killed = state(root / "out"), {"old": 0, "new": 0}, 0, True
    while killed:
        killed = forked(lambda: job("6"), step)
        found = state(root / "out")
        assert found in (old, new), found
        left["old" if found == old else "new"] += killed
        if found == new and killed:
            job("4")
        step += 4
    job("4")
    return {**left, "beside": sorted(p.name for p in root.iterdir())}


def pushing(root: Path) -> dict:
    import loopback_hub

    with loopback_hub.hub(root / "hub") as hub:
        (root / "hub").mkdir()
        os.environ.update(loopback_hub.environment(hub, root / "home"))
        os.environ.pop("HF_HUB_OFFLINE", None)
        import orthoact
        from orthoact.convert.checkpoint import save
        from orthoact.convert.hub import push
        from orthoact.convert.sources import load_source

        for degree in (4, 6):
            source = load_source("demo")
            orthoact.convert_(source.model, degree=degree)
            save(source.model, root / f"out{degree}", source=source)

        def pushed(degree: int, at: int | None) -> bool:
            """Push in a fork that the Hub kills at its request `at`."""
            seen = len(hub.log)
            pid = fork()
            if not pid:
                push(root / f"out{degree}", "tester/m", wait=0.01)
                os._exit(0)
            stop = threading.Event()

            def watch():
                while not stop.is_set():
                    if at is not None and len(hub.log) - seen > at:
                        os.kill(pid, signal.SIGKILL)
                        return
                    time.sleep(0.0002)

            watcher = threading.Thread(target=watch)
            watcher.start()
            _, status = os.waitpid(pid, 0)
            stop.set()
            watcher.join()
            time.sleep(0.05)  # the Hub ends what it has begun
            return os.WIFSIGNALED(status)

        pushed(6, None)
        new = hub.commit("tester/m")
        pushed(4, None)
        old, left, step, killed = hub.commit("tester/m"), {"old": 0, "new": 0}, 0, True
        while killed:
            killed = pushed(6, step)
            found = hub.commit("tester/m")
            assert found in (old, new), f"step {step}"
            left["old" if found == old else "new"] += killed
            if found == new and killed:
                pushed(4, None)
            step += 1
        return left | {"after": hub.commit("tester/m") == new}


if __name__ == "__main__":
    import warnings

    from tqdm import tqdm

    warnings.simplefilter("ignore")
    # the lock of progress bars is one for all forks: who is killed while he holds it would stop the others for ever
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    sys.path.insert(0, str(Path(__file__).parent))
    job, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(exist_ok=True)
    jobs = {"convert": converting, "push": pushing}
    print(json.dumps(jobs[job](folder) if job in jobs else saving(folder, job)))
