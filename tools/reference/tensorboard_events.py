"""An event file as TensorBoard's own writer makes it, for @moe/trainer.

    pip install tensorboard==2.21.0
    python3 tools/reference/tensorboard_events.py

writes packages/trainer/fixtures/events.tfevents: six events at 1764230400.25 seconds and after, with a header, the start of a
session, three scalars, a text and four hyperparameters. The test makes the same events; both files must be equal.
"""

from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

START = 1764230400.25


def text(tag, content):
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[content.encode()])
    tensor.tensor_shape.SetInParent()
    metadata = summary_pb2.SummaryMetadata(plugin_data={"plugin_name": "text"})
    return summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)


def hyperparameters(name, value):
    info = plugin_data_pb2.SessionStartInfo(start_time_secs=START)
    field = {str: "string_value", bool: "bool_value"}.get(type(value), "number_value")
    setattr(info.hparams[name], field, value)
    data = plugin_data_pb2.HParamsPluginData(session_start_info=info)
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT)
    tensor.tensor_shape.dim.add()
    plugin = {"plugin_name": "hparams", "content": data.SerializeToString()}
    metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
    return summary_pb2.Summary.Value(tag="_hparams_/session_start_info", tensor=tensor, metadata=metadata)


def scalar(tag, value):
    return summary_pb2.Summary.Value(tag=tag, simple_value=value)


def events():
    yield dict(file_version="brain.Event:2")
    yield dict(step=201, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
    values = [text("settings", "| lr | 0.01 |\n| Größe | 2 |"), hyperparameters("lr", 0.01)]
    yield dict(step=200, summary=summary_pb2.Summary(value=values))
    yield dict(step=300, summary=summary_pb2.Summary(value=[scalar("train/nll", 2.5), scalar("model/maxVio", 0.1)]))
    yield dict(step=2**40 + 1, summary=summary_pb2.Summary(value=[scalar("train/lr", -1e-38)]))
    values = [hyperparameters("optimizer", "muon"), hyperparameters("clipped", True), hyperparameters("seed", 0)]
    yield dict(summary=summary_pb2.Summary(value=values))


path = Path("packages/trainer/fixtures/events.tfevents")
path.parent.mkdir(exist_ok=True)
with open(path, "wb") as file:
    writer = RecordWriter(file)
    for number, fields in enumerate(events()):
        writer.write(event_pb2.Event(wall_time=START + number, **fields).SerializeToString())
    writer.flush()
