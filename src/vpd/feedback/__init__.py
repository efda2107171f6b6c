"""Verdicts -> teacher prompts."""

from vpd.feedback.build import build_views
from vpd.feedback.critique import Critic, EndpointCritic, SelfCritic
from vpd.feedback.prompts import PromptBuilder
from vpd.feedback.texts import FeedbackTexts, choose_texts

__all__ = [
    "Critic",
    "EndpointCritic",
    "FeedbackTexts",
    "PromptBuilder",
    "SelfCritic",
    "build_views",
    "choose_texts",
]
