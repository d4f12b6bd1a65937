"""Other people's models, small and with random weights, and what becomes of them.

`python -m tests.other_models` writes docs/models.md, `python -m tests.other_models --torchvision` prints the rows of
torchvision's models as JSON. Both need `make build/torchvision`: installed where others find it, its CUDA wheel would
break the imports of `transformers` beside a PyTorch for the CPU.
"""

from __future__ import annotations

import collections
import copy
import io
import json
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers as hf
from torch import nn

import lance_kernels as lance
from tests.models import images, mobilenet, resnet, vit, with_statistics
from tests.torchvision_operators import define_torchvision_operators

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
TORCHVISION = ROOT / "build" / "torchvision"
TOKENS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 32, "num_labels": 5}


def pictures():
    x, labels = images(8)
    return {"pixel_values": x, "labels": labels}


def sentences(classes=True):
    ids = torch.randint(0, 64, (8, 12))
    return {"input_ids": ids, "labels": torch.arange(8) % 5 if classes else ids}


def lora():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return peft.get_peft_model(vit(), config)


def swin():
    config = hf.SwinConfig(**IMAGE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return hf.SwinForImageClassification(config)


def convnext():
    config = hf.ConvNextConfig(num_labels=5, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2)
    return hf.ConvNextForImageClassification(config)


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TOKENS, intermediate_size=64, num_key_value_heads=1))


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**TOKENS, intermediate_size=64, num_labels=5))


def deit():
    return hf.DeiTForImageClassification(hf.DeiTConfig(**BODY, **IMAGE, patch_size=8))


MODELS = {
    "transformers ResNet": (resnet, pictures),
    "transformers MobileNetV2": (mobilenet, pictures),
    "transformers ViT": (vit, pictures),
    "transformers DeiT": (deit, pictures),
    "transformers Swin": (swin, pictures),
    "transformers ConvNeXt": (convnext, pictures),
    "transformers BERT": (bert, sentences),
    "transformers Llama": (llama, lambda: sentences(False)),
    "peft LoRA of ViT": (lora, pictures),
}


class Classifier(nn.Module):
    """A torchvision model with the interface of the others."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return hf.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


def torchvision_models():
    """The makers of torchvision's models; its wheel imports beside a CPU build once its operators are defined."""
    if not TORCHVISION.is_dir():
        raise FileNotFoundError(f"{TORCHVISION} is not there; run `make build/torchvision`")
    define_torchvision_operators()
    sys.path.append(str(TORCHVISION))
    from torchvision import models

    settings = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    makers = {
        "ResNet-50": lambda: models.resnet50(num_classes=5),
        "MobileNetV3": lambda: models.mobilenet_v3_small(num_classes=5, dropout=0.0),
        "RegNet": lambda: models.regnet_x_400mf(num_classes=5),
        "ViT": lambda: models.VisionTransformer(32, 8, num_classes=5, **settings),
    }
    return {f"torchvision {name}": (lambda make=make: Classifier(make()), pictures) for name, make in makers.items()}


def prepared(name):
    """The model in eval mode and a batch for it."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        with_statistics(model)
    return model.eval(), batch()


def trained(model, batch, optimizer_type, lr):
    """The losses of ten steps of a copy."""
    model = copy.deepcopy(model)
    optimizer = optimizer_type([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(10):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        # A random network's gradients are of any size.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(name):
    """Takes one model through everything, asserts what has to hold, and returns its row of the table."""
    model, batch = prepared(name)
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    plain = copy.deepcopy(model)
    before = model(**batch).logits
    held_plain = lance.held_bytes(plain, batch)
    summary = lance.compress_(model)
    assert torch.equal(model(**batch).logits, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lance.calibrate(model, [batch], progress=False)
    assert torch.equal(model(**batch).logits, before)

    losses = {
        "SGD": trained(model, batch, torch.optim.SGD, 3e-3),
        "AdamW": trained(model, batch, torch.optim.AdamW, 3e-4),
    }
    for optimizer, values in losses.items():
        assert values[-1] < values[0], (optimizer, values)

    report = lance.report(model, batch)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = prepared(name)[0]
    lance.compress_(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    ours, theirs = (gradients(one, batch) for one in (model, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))

    lance.revert_(model)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**batch).logits, before)
    left = collections.Counter(summary.left.values()) + collections.Counter(
        ["never called by the model"] * len(found.uncalled)
    )
    return {
        "model": name,
        "compressed": len(summary.compressed) - len(found.uncalled),
        "shared": len(found.shared),
        "left": "; ".join(f"{count} {reason}" for reason, count in left.items()) or "none",
        "held": f"{held_plain / 1e6:.2f} / {report.held_bytes / 1e6:.2f} MB",
        "counted": f"{report.dense_bytes / max(report.counted_bytes, 1):.1f}x",
        "cosine": f"{report.gradient_cosine:.3f}",
    }


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def page(rows):
    """The text of docs/models.md."""
    lines = [
        "# Other people's models",
        "",
        "Written by `python -m tests.other_models`; `tests/test_other_models.py` takes all of them through the same:",
        "`compress_` (forward bit for bit as before), `calibrate`, ten steps each of SGD and AdamW, a state saved and",
        "loaded (the same gradients bit for bit), `revert_`. The models are small ones of their classes with random",
        "weights, which is the hardest case: random features have little low-rank structure. `LanceConfig()`",
        "throughout. Weights behind a zero one (LoRA's first factors, the body of torchvision's ViT) have no gradient",
        "at first and count as cosine 0.",
        "",
        "- **Compressed**: layers that keep a core; **sharing**: those of them that use another's core and factors.",
        "- **Held**: bytes that autograd holds between forward and backward, plain / compressed, companions included.",
        "- **Counted**: the compressed layers' inputs over their cores, as papers count. **Cosine**: mean over the",
        "  layers between compressed and dense weight gradient, on the calibration batch.",
        "",
        "| model | compressed | sharing | left alone, and why | held | counted | cosine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
        "",
        f"torch {torch.__version__.partition('+')[0]}, transformers {hf.__version__}, peft {peft.__version__}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    visions = torchvision_models()
    MODELS.update(visions)
    if sys.argv[1:] == ["--torchvision"]:
        print(json.dumps([check(name) for name in visions]))
    else:
        PAGE.write_text(page([check(name) for name in MODELS]))
