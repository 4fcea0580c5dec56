"""ragturbo behind LitServe: `pip install litserve`, then `python examples/serving/litserve_app.py`.

LitServe starts a process per device and batches requests; a Generator accepts the batch as lists.
"""

import base64

import litserve as ls

import ragturbo


class Images(ls.LitAPI):
    def setup(self, device):
        self.gen = ragturbo.Generator.from_pretrained("shapes", device=device)
        self.gen.warmup()

    def decode_request(self, request):
        return request["prompt"], int(request.get("seed", 0))

    def predict(self, requests):
        prompts, seeds = zip(*requests, strict=True)
        return self.gen(list(prompts), seed=list(seeds), output_type="png", timeout=10).images

    def encode_response(self, png):
        return {"b64_json": base64.b64encode(png).decode()}


if __name__ == "__main__":
    ls.LitServer(Images(max_batch_size=8, batch_timeout=0.005)).run(port=8000, host="127.0.0.1")
