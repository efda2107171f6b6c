"""Turns verdicts into the teacher's prompts."""

from vpd.feedback.build import Feedback, build_views
from vpd.feedback.critique import Answers, Critic, EndpointCritic, SelfCritic
from vpd.feedback.prompts import PromptBuilder
from vpd.feedback.sources import CritiqueSource, FeedbackSource, Group, choose_texts, make_sources
from vpd.feedback.success import successes
from vpd.feedback.tally import Tally
from vpd.feedback.texts import FeedbackTexts

__all__ = [
    "Answers",
    "Critic",
    "CritiqueSource",
    "EndpointCritic",
    "Feedback",
    "FeedbackSource",
    "FeedbackTexts",
    "Group",
    "PromptBuilder",
    "SelfCritic",
    "Tally",
    "build_views",
    "choose_texts",
    "make_sources",
    "successes",
]
