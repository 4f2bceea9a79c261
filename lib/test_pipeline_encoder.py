"""pytest lib/test_pipeline_encoder.py: the text encoders of a pipeline, against the pipeline itself."""
import os
import shutil

import pytest
import torch

import sample as sampling
from lib.pipeline_encoder import PipelineEncoder
from lib.settings import UserError
from lib.test_published import CAPTIONS, copied, embeddings_of, pipelines  # noqa: pipelines is a fixture
from model import read_checkpoint


@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_captions_are_embedded_as_the_pipeline_does_one_encoder_after_the_other(pipelines, kind, capsys,  # noqa
                                                                                monkeypatch):
    pipeline, folder = pipelines[kind]
    config, long = read_checkpoint(folder)["config"], "big " * 400
    captions = [CAPTIONS[0], long, "", CAPTIONS[0]]
    text = sampling.encode_captions(captions, config)
    rows, other = embeddings_of(pipeline, [CAPTIONS[0], long])[0]
    limit = {"pixart": 300, "sdxl": 77}[kind]
    assert f"reads {limit} of 401 tokens, the rest is cut: 'big big" in capsys.readouterr().err
    if kind == "pixart":
        for ours, theirs, mask in zip(text, rows, other):
            assert torch.allclose(ours[:mask.sum()], theirs[mask.bool()], atol=1e-5) and not ours[mask.sum():].any()
    else:
        assert torch.allclose(text[:2, :77], rows, atol=1e-5) and torch.allclose(text[:2, 77, :20], other, atol=1e-5)
        assert not text[:, 77, 20:].any()
    assert torch.equal(text[0], text[3]) and not text[2].any()
    opened = []
    monkeypatch.setattr(PipelineEncoder, "open", lambda self, part, open=PipelineEncoder.open:
                        opened.append((part, list(self.opened))) or open(self, part))
    for memory, times in ((0, 2), (10 ** 12, 1)):              # short: let go after use; else kept
        monkeypatch.setattr("lib.pipeline_encoder.free_memory", lambda device: memory)
        opened.clear()
        encoder = PipelineEncoder(config["text_length"], folder, "fp32")
        encoder(["a"]), encoder(["b"])
        parts = ["text_encoder", "text_encoder_2"][:len(encoder.parts)]
        assert [part for part, _ in opened] == parts * times
        assert all(kept == [] or memory for _, kept in opened)


def test_a_tokenizer_is_read_from_its_sentencepiece_model(pipelines, tmp_path):  # noqa
    """As PixArt-Sigma is downloaded: spiece.model and no tokenizer.json."""
    pytest.importorskip("google.protobuf"), pytest.importorskip("sentencepiece")
    folder = copied(pipelines["pixart"][1], tmp_path)
    shutil.rmtree(folder / "tokenizer"), os.mkdir(folder / "tokenizer")
    options = dict(model_prefix=str(folder / "tokenizer/spiece"), vocab_size=40, hard_vocab_limit=False, minloglevel=2)
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS * 9), pad_id=0, eos_id=1, unk_id=2,
                                             bos_id=-1, **options)
    (folder / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer/spiece.model"))
    tokenizer = PipelineEncoder(300, str(folder), "fp32").tokenizer("text_encoder")
    assert tokenizer(CAPTIONS[0]).input_ids == pieces.encode(CAPTIONS[0]) + [1]
    (folder / "tokenizer/spiece.model").write_text("")
    with pytest.raises(UserError) as error:
        PipelineEncoder(300, str(folder), "fp32").tokenizer("text_encoder")
    assert "tokenizer' does not open" in error.value.message and "sentencepiece protobuf" in error.value.message
