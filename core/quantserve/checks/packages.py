"""Architectures whose model class vLLM cannot import without a package that a CPU install may lack.

Taken from vLLM 0.32 by scripts/multimodal_needs.py, and held against the installed one by a test. The import fails
before any setting counts: neither `limit_mm_per_prompt` nor `language_model_only` helps.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from quantserve.finding import Finding
from quantserve.model.architecture import class_names, short

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig
    from quantserve.target import Target

CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEEDS: Final = {
    "torchvision": _names("""
    BailingMoeV3VLForConditionalGeneration BeeForConditionalGeneration ClefOmniForJointSchema
    Cohere2VisionForConditionalGeneration CohereCompassForConditionalGeneration ColQwen3 ColQwen3_5
    Cosmos3EdgeForConditionalGeneration Cosmos3ForConditionalGeneration DeepseekOCR2ForCausalLM
    DeepseekOCRForCausalLM DiffusionGemmaForBlockDiffusion DotsOCRForCausalLM
    Eagle2_5_VLForConditionalGeneration EmbeddingGemma2Model Exaone4_5_ForConditionalGeneration
    Gemma3ForConditionalGeneration Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
    Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration Glm5NextForCausalLM
    Glm5NextForConditionalGeneration Glm5NextMTPModel GlmOcrForConditionalGeneration
    Granite4VisionForConditionalGeneration H2OVLChatModel HCXVisionV2ForCausalLM
    InternS1ForConditionalGeneration InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration
    InternS2MobiusMTP InternS2PreviewForConditionalGeneration InternVLChatModel InternVLForConditionalGeneration
    JinaVLForRanking Lfm2VlForConditionalGeneration LightOnOCRForConditionalGeneration
    Llama4ForConditionalGeneration LlamaNemotronVLForSequenceClassification LlamaNemotronVLModel
    Llama_Nemotron_Nano_VL LlavaForConditionalGeneration LlavaNextForConditionalGeneration
    LlavaNextVideoForConditionalGeneration LlavaOnevision2ForConditionalGeneration
    LlavaOnevisionForConditionalGeneration MiMoV2OmniForCausalLM MiniCPMV4_6ForConditionalGeneration
    MiniCPMV4_7ForConditionalGeneration MiniMaxM3MTP MiniMaxM3SparseForCausalLM
    MiniMaxM3SparseForConditionalGeneration Mistral3ForConditionalGeneration MuseGlimmerForCausalLM
    MuseGlimmerForConditionalGeneration NVLM_D NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2
    NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 OpenCUAForConditionalGeneration
    OpenPanguVLForConditionalGeneration OpsColQwen3Model Phi4ForCausalLMV PixtralForConditionalGeneration
    QianfanOCRForConditionalGeneration Qwen2VLForConditionalGeneration Qwen2_5OmniForConditionalGeneration
    Qwen2_5OmniModel Qwen2_5_VLForConditionalGeneration Qwen3ASRForConditionalGeneration
    Qwen3ASRForcedAlignerForTokenClassification Qwen3ASRRealtimeGeneration Qwen3OmniMoeForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3VLNemotronEmbedModel
    Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MTP Qwen3_5MoeForCausalLM
    Qwen3_5MoeForConditionalGeneration Qwen3_5MoeMTP RForConditionalGeneration SkyworkR1VChatModel
    Step3VLForConditionalGeneration Step3p7ForConditionalGeneration StepVLForConditionalGeneration
    UnlimitedOCRForCausalLM
    """),
    "torchaudio": _names("""
    CohereAsrForConditionalGeneration FunASRForConditionalGeneration MiDashengLMModel
    """),
}
"""Package -> architectures."""


def check_packages(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """Find an architecture that the vLLM of this machine cannot import."""
    names = class_names(checkpoint)[:1]
    own = model.engine_kwargs.get("model_impl", "auto") in ("auto", "vllm")
    if not (target.is_here and names and own) or find_spec("vllm") is None:
        return
    for package, architectures in NEEDS.items():
        if names[0] in architectures and find_spec(package) is None:
            yield Finding.error(
                "package-missing",
                f"vLLM cannot import {short(names[0])}: {package} is not installed, which it needs even for text alone",
                [package],
                how_to_install(package),
            )


def how_to_install(package: str) -> str:
    """How to install the build that fits the installed torch."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return f"pip install {package}"
    major, minor = torch.split(".")[:2]
    if package == "torchvision" and major == "2" and minor.isdigit():
        package = f"'torchvision==0.{int(minor) + 15}.*'"  # PyTorch's table of versions
    index = f" --index-url {CPU_INDEX}" if torch.endswith("+cpu") else ""
    return f"pip install {package}{index}, the build for torch {torch}"
