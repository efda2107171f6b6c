"""Verdicts -> teacher prompts."""

from vpd.feedback.build import build_views
from vpd.feedback.critique import Critic, EndpointCritic, SelfCritic
from vpd.feedback.prompts import PromptBuilder
from vpd.feedback.sources import CritiqueSource, FeedbackSource, Group, choose_texts, make_sources
from vpd.feedback.texts import FeedbackTexts

__all__ = [
    "Critic",
    "CritiqueSource",
    "EndpointCritic",
    "FeedbackSource",
    "FeedbackTexts",
    "Group",
    "PromptBuilder",
    "SelfCritic",
    "build_views",
    "choose_texts",
    "make_sources",
]
