"""ragturbo behind Triton's Python backend: `tritonserver --model-repository examples/serving/triton`."""

from concurrent.futures import Future

import triton_python_backend_utils as pb

import ragturbo


class TritonPythonModel:
    def initialize(self, args):
        gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        self.gen = ragturbo.Generator.from_pretrained("shapes", device=device)
        self.gen.warmup()

    def execute(self, requests):
        # Submit all requests before waiting for the first, so that they run as one batch.
        return [self._answer(future) for future in [self._submit(request) for request in requests]]

    def finalize(self):
        self.gen.close()

    def _submit(self, request):
        try:
            texts, seeds = (pb.get_input_tensor_by_name(request, n).as_numpy().reshape(-1) for n in ("PROMPT", "SEED"))
            prompts = [text.decode() for text in texts]
            return self.gen.submit(prompts, seed=seeds.tolist(), output_type="uint8", timeout=10)
        except Exception as error:  # must not fail the other requests
            failed = Future()
            failed.set_exception(error)
            return failed

    def _answer(self, future):
        try:
            return pb.InferenceResponse(output_tensors=[pb.Tensor("IMAGES", future.result().images)])
        except Exception as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error)))
