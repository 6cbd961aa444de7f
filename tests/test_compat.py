"""What is private in torch and transformers and used here is still there; an import of accumloss brings nothing heavy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import accumloss
from accumloss import _compat


def test_not_compiled_runs_outside_of_the_graph():
    """Dropped by a torch where this import fails; until then the function is called with what the graph computed."""
    seen = []

    @_compat.not_compiled
    def look(x):
        seen.append(type(x))
        return x + 1

    compiled = torch.compile(lambda x: look(x * 2) * 3, backend="eager")
    assert compiled(torch.ones(())).item() == 9
    assert seen == [torch.Tensor]  # while it is traced a tensor is not a torch.Tensor of numbers


def test_guards_and_keys_of_the_dispatcher():
    """Below autograd nothing is recorded; a kernel on ADInplaceOrView is skipped below it, and else passes the call on."""
    leaf = torch.zeros(2, 3, requires_grad=True)
    labels = torch.tensor([0, 1])
    with _compat.below_autograd():
        assert not torch.ops.accumloss.cross_entropy(leaf, labels)[0].requires_grad
    assert torch.ops.accumloss.cross_entropy(leaf, labels)[0].requires_grad
    values, two = torch.ones(2, 3), torch.tensor(2.0)
    with _compat.below_ad_inplace():
        torch.ops.accumloss.scale_(values, two)
    assert (values == 2).all()
    torch.ops.accumloss.scale_(values, two)
    assert (values == 4).all()
    for keys in (_compat.after_ad_inplace, _compat.after_autograd):
        assert isinstance(keys, torch._C.DispatchKeySet)


class Double(torch.autograd.Function):
    apply = _compat.direct_apply

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_a_kernel_of_the_dispatcher_can_be_kept_and_called():
    kernel = _compat.computed_kernel("aten::neg", "CPU")
    one = torch.ones(())
    assert kernel(torch._C._dispatch_keys(one), one) == -1


def test_what_is_to_happen_when_cuda_starts_waits_for_it(monkeypatch):
    """In a torch without CUDA it is never called; where CUDA has started it is called at once."""
    calls: list = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_queued_calls", [])
    _compat.when_cuda_starts(lambda: calls.append(1))
    assert not calls
    (queued,) = torch.cuda._queued_calls
    queued[0]()
    assert calls == [1]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    _compat.when_cuda_starts(lambda: calls.append(2))
    assert calls == [1, 2]


def test_a_function_is_applied_without_what_torch_does_in_python():
    leaf = torch.ones((), requires_grad=True)
    doubled = Double.apply(leaf)
    assert doubled.grad_fn.name() == "DoubleBackward"
    doubled.backward()
    assert leaf.grad.item() == 2


def test_a_backward_and_the_levels_of_transforms_are_known():
    seen = []
    leaf = torch.ones((), requires_grad=True)
    leaf.register_hook(lambda grad: seen.append(_compat.current_backward()))
    for _ in range(2):
        (leaf * 2).backward()
    assert seen[0] != seen[1] and min(seen) >= 0 and _compat.current_backward() == -1
    assert not _compat.is_forward_ad_open() and not _compat.is_functorch_active()
    with torch.autograd.forward_ad.dual_level():
        assert _compat.is_forward_ad_open()
    torch.func.grad(lambda x: seen.append(_compat.is_functorch_active()) or x.sum())(torch.ones(2))
    assert seen[-1] is True


def test_many_tensors_at_once():
    group = [torch.ones(2), torch.full((3,), 2.0)]
    _compat.foreach_mul_(group, torch.tensor(3.0))
    assert [n.item() for n in _compat.foreach_norm(group, 2)] == pytest.approx([(2 * 9) ** 0.5, (3 * 36) ** 0.5])


def test_layers_and_subclasses():
    assert isinstance(torch.nn.BatchNorm2d(2), _compat.BatchNorm) and isinstance(torch.nn.Dropout1d(), _compat.Dropout)

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args, **kwargs):
            raise AssertionError("asked")

    value = torch.ones(2).as_subclass(Asked)
    with _compat.without_subclasses():
        assert (value + 1).sum() == 4
    assert _compat.tree_map(lambda x: x + 1, {"a": [1, (2,)]}) == {"a": [2, (3,)]}


def test_the_mean_of_a_scalar_is_told_by_its_node():
    leaf = torch.ones((), requires_grad=True)
    assert _compat.is_mean_of_scalar(leaf.mean().grad_fn)
    assert not _compat.is_mean_of_scalar(leaf.expand(1).mean().grad_fn)
    assert not _compat.is_mean_of_scalar((leaf / 2).grad_fn)


def test_a_node_names_its_function():
    leaf = torch.ones((), requires_grad=True)
    assert _compat.function_of(Double.apply(leaf).grad_fn) is Double
    assert _compat.function_of((leaf * 2).grad_fn) is None


def test_the_end_of_a_backward():
    seen = []
    leaf = torch.ones((), requires_grad=True)
    leaf.register_hook(lambda grad: _compat.at_the_end_of_backward(lambda: seen.append("end")) or seen.append("hook"))
    (leaf * 2).backward()
    assert seen == ["hook", "end"]


def test_a_scaler_tells_whether_it_has_looked():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler.scale(weight.sum()).backward()
    assert not _compat.has_found_inf(scaler)
    scaler.unscale_(optimizer)
    assert _compat.has_found_inf(scaler)


def test_a_compiled_model_and_hooks_on_all_modules():
    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert _compat.is_compiled(compiled) and not _compat.is_compiled(model)
    assert _compat.uncompiled(compiled) is model is _compat.uncompiled(model)
    assert not _compat.global_hooks()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert _compat.global_hooks()
    handle.remove()
    assert _compat.local_of(torch.ones(2)) is None


ACCELERATE = """
import accelerate, torch, transformers
from accumloss import _compat
config = transformers.BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
model = transformers.BertForMaskedLM(config)
model.loss_function = len
assert vars(model)[_compat.LOSS_FUNCTION] is len
accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
theirs = model.forward
assert _compat.without_autocast(model) is None and _compat.dataloaders_of(accelerator) == []
prepared, loader = accelerator.prepare(model, torch.utils.data.DataLoader([1, 2]))
assert _compat.without_autocast(prepared).__func__ is theirs.__func__
assert _compat.dataloaders_of(accelerator) == [loader]
assert not _compat.is_offloaded(model)
accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
assert _compat.is_offloaded(model)
"""


def test_names_of_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
    assert getattr(arguments, _compat.NUM_GPUS) == arguments.n_gpu
    setattr(arguments, _compat.NUM_GPUS, 3)
    assert arguments.n_gpu == 3
    setattr(arguments, _compat.NUM_GPUS, 0)
    model = torch.nn.Linear(2, 2)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=[{"x": torch.ones(2)}])
    assert _compat.prepared_inputs(trainer, {"x": torch.ones(2)})["x"].tolist() == [1, 1]
    trainer.state.global_step, trainer._globalstep_last_logged = 3, 2
    assert _compat.has_steps_to_log(trainer)
    trainer.state.global_step = 2
    assert not _compat.has_steps_to_log(trainer)
    trainer._loss_shifts_labels = trainer.model_accepts_loss_kwargs = True
    batches = [{"labels": torch.tensor([[1, 2, 3]])}]
    if hasattr(transformers.Trainer, "get_sp_size"):  # older ones shift nothing
        assert trainer._get_num_items_in_batch(batches, arguments.device) == 2
    with _compat.labels_as_they_are(trainer):
        assert trainer._get_num_items_in_batch(batches, arguments.device) == 3


def test_criteria_ask_for_the_ranks_by_names_that_have_a_stand_in():
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    from transformers.loss import loss_for_object_detection

    assert loss_for_object_detection.PartialState is accelerate.PartialState
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        from transformers.loss import loss_lw_detr

        assert not loss_lw_detr._is_torch_distributed_initialized()
    alone = [True]
    stands_in = _compat.ASKS_FOR_RANKS["PartialState"](accelerate.PartialState, lambda: alone[0])
    asks = _compat.ASKS_FOR_RANKS["_is_torch_distributed_initialized"](lambda: True, lambda: alone[0])
    assert stands_in._shared_state == {} and not asks()
    alone[0] = False
    assert stands_in._shared_state is accelerate.PartialState._shared_state and asks()


def test_names_of_transformers_and_accelerate():
    """In a process of its own: accelerate has one state of a process, and one precision."""
    pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    done = subprocess.run([sys.executable, "-P", "-c", ACCELERATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_private_names_stand_in_one_file():
    """A name that begins with an underscore, of an object that is not ours, is said by _compat.py alone."""
    ours = {"_C", "_ops", "_replace", "_asdict", "_make"}  # of the package, and of NamedTuple
    ours |= {"_version", "_check", "_make_wrapper_subclass"}  # documented, in spite of their names
    found = []
    package = Path(accumloss.__file__).parent
    for path in package.rglob("*.py"):
        # known.py writes down what trl's Trainers hold: it is a table of such names
        if path.name in ("_compat.py", "known.py") or "auditing" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        mine = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        mine |= {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.fullmatch("_[a-zA-Z][a-zA-Z0-9_]*", node.attr):
                owner = ast.unparse(node.value)
                is_theirs = "torch" in owner.split(".")[0] or owner.endswith(("trainer", "trainer.args", "accelerator"))
                if is_theirs and node.attr not in ours | mine:
                    found.append(f"{path.relative_to(package)}:{node.lineno}: {ast.unparse(node)}")
    assert not found


def test_import_brings_no_compiler_no_audit_no_transformers():
    heavy = ["torch._dynamo", "torch._inductor", "sympy", "transformers", "accelerate", "rich", "accumloss.auditing"]
    program = "import torch, sys; before = set(sys.modules); import accumloss; "
    program += f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_audit_is_there_when_it_is_asked_for():
    assert "audit" in dir(accumloss) and accumloss.audit.__module__ == "accumloss.auditing"
    assert not hasattr(accumloss, "adit")
