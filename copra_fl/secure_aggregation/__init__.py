"""Secure aggregation: the server learns the sum of the nodes' vectors and nothing else of them.

Bonawitz et al., CCS 2017, with the sparse graph of SecAgg+ (Bell et al., CCS 2020). A round has five steps:

    1 keys       a node makes two key pairs and a self seed, and signs the public keys and the seed's hash
    2 shares     it splits the seed and the private mask key into shares, and seals one of each for every neighbour
    3 masked     it sends its vector plus the self mask, plus or minus a mask that it shares with each neighbour
    4 survivors  it signs the list of the nodes that have sent a vector, one list a round
    5 unmask     it gives its share of the seed of every node on the list, of the mask key of the others, if `threshold`
                 of the nodes on it have signed it

Masks that two nodes share cancel in the sum. The server removes the self masks with the rebuilt seeds, and the masks of
nodes that dropped out after step 2 with their rebuilt mask keys. Two lists of survivors cannot both have enough
signatures while fewer than 2 threshold - n nodes sign two: all nodes then reveal shares for one sum, of at least
`threshold` nodes (the consistency check of Bonawitz et al.). `node` and `server` are the two sides, without any
transport: messages in, messages out.
"""
