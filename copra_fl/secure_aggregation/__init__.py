"""Secure aggregation: the server learns the sum of the nodes' vectors and nothing else of them.

Bonawitz et al., CCS 2017, with the sparse graph of SecAgg+ (Bell et al., CCS 2020). A round has four steps:

    1 keys     a node makes two key pairs and a self seed, and signs the public keys and the seed's hash
    2 shares   it splits the seed and the private mask key into shares, and seals one of each for every neighbour
    3 masked   it sends its vector plus the self mask, plus or minus a mask that it shares with each neighbour
    4 unmask   it gives its share of the seed of every node that has sent a vector, of the mask key of the others

Masks that two nodes share cancel in the sum. The server removes the self masks with the rebuilt seeds, and the masks of
nodes that dropped out after step 2 with their rebuilt mask keys. `node` and `server` are the two sides, without any
transport: messages in, messages out.
"""
