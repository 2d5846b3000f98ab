"""The tasks, and the environment that runs any of them on any robot. To add one: a file, a registry line."""

from blm.tasks.env import Env, EnvState
from blm.tasks.registry import TASKS
from blm.tasks.rendering import gl_backend
from blm.tasks.spec import ObjectState, TaskSpec, World

__all__ = ["TASKS", "Env", "EnvState", "ObjectState", "TaskSpec", "World", "gl_backend"]
