"""How `fastnorm.fuse` works; fuse.py is the door.

read, settings, source    the text of methods, as one instance runs them
usage                     who calls a norm, and what is handed on
match, flow, fresh        what follows a call, and the proof
edit                      the methods with the calls made one
calls                     what the rewritten methods call: each call asks the modules that are there now
containers                where a container's forward is known: nn.Sequential, timm
graph, ungraph            graphs of torch.fx and torch.export
record                    what stays on the model, and the way back
"""
