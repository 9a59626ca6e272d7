"""stub"""
def tensor_parallel(nodes, types, inputs, plan):
    return nodes, types, {}
