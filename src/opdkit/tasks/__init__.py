"""Where prompts come from: files, `datasets`, reasoning-gym, the testbed (`load.load_task`); how they are encoded."""
