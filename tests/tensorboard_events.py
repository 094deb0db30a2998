"""Reads scalars out of TensorBoard's event files, by their documented record format."""

import struct

from tensorboardX.proto.event_pb2 import Event


def scalars(directory, tag):
    """Steps and values of a tag, in the order in which they were written."""
    found = []
    for path in sorted(directory.iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            # A record: uint64 length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 12 + length + 4
            found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return found
