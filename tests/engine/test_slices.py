"""A large batch goes through the VAE in parts."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from ragturbo.engine import fast_model as fast


def test_images_decoded_in_parts_are_those_of_the_whole_batch(graph_engine, reference, make_request, monkeypatch):
    batch = make_request("a red circle", "a blue cat", "a dog", output_type="pt")
    expected = reference.run(batch).image
    # The small model's images have 128² pixels.
    for at_once, sizes in ((2 * 128 * 128, [2, 1]), (1, [1, 1, 1])):
        monkeypatch.setattr(fast, "_DECODED_AT_ONCE", at_once)
        engine = graph_engine()
        with patch.object(engine.model.vae, "decode", wraps=engine.model.vae.decode) as decode:
            image = engine.run(batch).image
        assert [len(call.args[0]) for call in decode.call_args_list] == sizes
        assert image.shape == expected.shape
        assert float((image - expected).abs().max()) == pytest.approx(0, abs=1e-4)
