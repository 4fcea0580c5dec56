"""Recording tests that need a GPU: after a failure, from two threads, and with cleared cuBLAS workspaces."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from ragturbo.engine.cuda_graphs import CudaGraphs
from ragturbo.errors import GenerationError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs"),
]
Make = Callable[..., tuple[Callable[[], None], torch.Tensor, torch.Tensor]]


@pytest.fixture
def make_step() -> Make:
    """A step with products on both streams of `recorder`, its output and the expected output. It calls `fault`."""
    # A graph does not keep the caller's tensors alive: if they were freed, later allocations would overwrite them.
    kept: list[torch.Tensor] = []

    def make(
        recorder: CudaGraphs, fault: Callable[[torch.Tensor], object] = lambda x: None, side: int = 512
    ) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
        a, b = (torch.randn(side, side, device="cuda", dtype=torch.float16) for _ in range(2))
        out = torch.zeros_like(a)
        kept.extend((a, b, out))

        def step() -> None:
            with recorder.stage("first"):
                left = a @ b
            with recorder.fork():
                right = b @ a
            fault(left)
            recorder.join()
            out.copy_(left + right)

        expected = a @ b + b @ a
        torch.cuda.current_stream().synchronize()
        return step, out, expected

    return make


def replays(program, out: torch.Tensor, expected: torch.Tensor, recorder: CudaGraphs) -> bool:
    with recorder.main_stream():
        out.zero_()
    program.replay()
    recorder.wait_for_main()
    return torch.allclose(out, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_after_a_failed_capture_all_goes_on(make_step):
    """The branch is not joined when the fault is raised, as if a step of the model failed."""
    recorder = CudaGraphs(torch.device("cuda"))
    step, *values = make_step(recorder)
    earlier = recorder.record("earlier", step)
    for _ in range(2):
        broken = make_step(recorder, lambda x: x.sum().item())[0]
        with pytest.raises(GenerationError, match="cannot be captured"):
            recorder.record("broken", broken)
    # The default generator is not left capturing.
    assert torch.rand(4, device="cuda").sum() > 0
    step, *others = make_step(recorder)
    later = recorder.record("later", step)
    for _ in range(3):
        assert replays(earlier, *values, recorder) and replays(later, *others, recorder)
    assert later.seconds()["first"] > 0


def test_a_capture_broken_by_another_threads_synchronize_is_tried_again(make_step, caplog):
    recorder = CudaGraphs(torch.device("cuda"))
    said: list[str] = []

    def synchronize() -> None:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            said.append(str(error))

    def fault(x: torch.Tensor) -> None:
        if torch.cuda.is_current_stream_capturing() and not said:
            thread = threading.Thread(target=synchronize)
            thread.start()
            thread.join()

    step, *values = make_step(recorder, fault)
    program = recorder.record("label", step)
    assert replays(program, *values, recorder)
    # The printed result shows whether RECORDING is needed for this call.
    print("synchronize beside a capture:", said or "allowed", "| tried again:", "tried again" in caplog.text)


def test_two_threads_record_and_replay_at_once(make_step):
    """Inputs are drawn before: while one thread records, the other may not use the default generator."""
    failed: list[BaseException] = []
    engines = [CudaGraphs(torch.device("cuda")) for _ in range(2)]

    def work(recorder: CudaGraphs, made: list) -> None:
        try:
            programs = [recorder.record("label", step) for step, *_ in made]
            for _ in range(20):
                for program, (_, *values) in zip(programs, made, strict=True):
                    assert replays(program, *values, recorder)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(one, [make_step(one) for _ in range(4)])) for one in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_no_replay_writes_to_memory_that_was_freed_with_the_workspaces(make_step):
    """As Inductor does before each of its own recordings: the table of workspaces is cleared, and others take the
    memory."""
    recorder = CudaGraphs(torch.device("cuda"))
    step, *values = make_step(recorder, side=192)
    program = recorder.record("label", step)
    torch._C._cuda_clearCublasWorkspaces()
    others = []
    for lane in (recorder.main_stream, recorder.retrieval_stream):
        with lane():
            others += [torch.full((32 << 20,), 255, dtype=torch.uint8, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(10):
        assert replays(program, *values, recorder)
    assert all(bool((other == 255).all()) for other in others)
