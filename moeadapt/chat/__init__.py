"""A conversation with an adapter or a base model, and the routing of each answer."""

from moeadapt.chat.conversation import Answer as Answer
from moeadapt.chat.conversation import Conversation as Conversation
from moeadapt.chat.conversation import Sampling as Sampling
from moeadapt.chat.routing import AnswerRouting as AnswerRouting
