"""Stage I (`sft`) and Stage II (`imitate`): two short trainers over one loop (`loop`)."""
