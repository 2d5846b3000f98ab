"""The tasks, and the environment that runs any task on any robot.

To add a task, write its file and add a line to the registry. Importing this package registers the
environments with Gymnasium (`blm.gymnasium_ids`).
"""

from blm.gymnasium_ids import register
from blm.tasks.eef_env import EefEnv
from blm.tasks.env import Env, EnvState
from blm.tasks.registry import SUITE24, TASKS, WORDS
from blm.tasks.rendering import gl_backend
from blm.tasks.spec import ObjectState, TaskSpec, TaskState
from blm.tasks.task_env import TaskEnv

__all__ = [
    "SUITE24",
    "TASKS",
    "WORDS",
    "EefEnv",
    "Env",
    "EnvState",
    "ObjectState",
    "TaskEnv",
    "TaskSpec",
    "TaskState",
    "gl_backend",
]

register()
