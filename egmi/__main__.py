"`python -m egmi`, alone or under `accelerate launch`"
from .commands.command import main

if __name__ == '__main__': # and not a process that one of its processes has started
    main()
