// Python bindings, and the only file that includes Python headers. It checks all arguments of calls and reads the
// specifications. Python sees std::invalid_argument as ValueError and std::bad_alloc as MemoryError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "executor.h"
#include "step_times.h"

namespace py = pybind11;

namespace fastcascade {
namespace {

using FloatArray = py::array_t<float, py::array::c_style>;

constexpr int64_t kMaxClasses = int64_t{1} << 20;
constexpr size_t kMaxRepr = 80;  // characters of a wrong value that messages show

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string repr_text(const py::handle& value) { return py::repr(value).cast<std::string>().substr(0, kMaxRepr); }

// ---- specifications: the fields of every dictionary are read here and nowhere else ----

py::dict as_dict(const py::handle& item, const char* what) {
  if (!py::isinstance<py::dict>(item))
    fail(std::string("expected ") + what + " as a dictionary, got " + repr_text(item));
  return py::reinterpret_borrow<py::dict>(item);
}

template <class T>
T get(const py::dict& d, const char* key) {
  if (!d.contains(key)) fail(std::string("field '") + key + "' is missing");
  try {
    return d[key].cast<T>();
  } catch (const std::exception&) {  // py::cast_error, or an exception of the object's own conversion
    fail(std::string("field '") + key + "' is " + repr_text(d[key]) + ", which has the wrong type, length or range");
  }
}

// A field that must be a contiguous float32 array. Its shape is written to `shape` if given.
std::vector<float> get_floats(const py::dict& d, const char* key, std::vector<int64_t>* shape = nullptr) {
  if (!d.contains(key) || !FloatArray::check_(d[key]))
    fail(std::string("field '") + key + "' must be a contiguous float32 array");
  const auto array = d[key].cast<FloatArray>();
  if (shape) shape->assign(array.shape(), array.shape() + array.ndim());
  return {array.data(), array.data() + array.size()};
}

template <size_t N>
void check_axes(const std::vector<int64_t>& shape, std::array<int64_t, 4>& out, const char* what) {
  if (shape.size() != N)
    fail(std::string(what) + " weight has " + std::to_string(shape.size()) + " axes, expected " + std::to_string(N));
  std::copy(shape.begin(), shape.end(), out.begin());
}

void set_activation(OpSpec& op, const std::string& kind) {
  static const std::map<std::string, Function> functions = {
      {"none", Function::none},  {"relu", Function::none},
      {"relu6", Function::none}, {"leaky_relu", Function::leaky_relu},
      {"elu", Function::elu},    {"sigmoid", Function::sigmoid},
      {"silu", Function::silu},  {"hard_sigmoid", Function::hard_sigmoid},
      {"gelu", Function::gelu},  {"hard_swish", Function::hard_swish},
      {"mish", Function::mish},  {"gelu_tanh", Function::gelu_tanh},
      {"tanh", Function::tanh},  {"exp", Function::exp},
      {"sqrt", Function::sqrt},  {"reciprocal", Function::reciprocal}};
  const auto found = functions.find(kind);
  if (found == functions.end()) fail("unknown activation '" + kind.substr(0, kMaxRepr) + "'");
  op.activation.function = found->second;
  if (kind == "relu" || kind == "relu6") op.activation.low = 0.f;
  if (kind == "relu6") op.activation.high = 6.f;
}

// The place of a name among the choices.
size_t read_choice(const py::dict& d, const char* key, std::initializer_list<const char*> choices) {
  const auto name = get<std::string>(d, key);
  const auto found = std::find(choices.begin(), choices.end(), name);
  if (found != choices.end()) return static_cast<size_t>(found - choices.begin());
  std::string expected;
  for (const char* choice : choices) expected += (expected.empty() ? "" : " or ") + std::string(choice);
  fail(std::string("field '") + key + "' is '" + name.substr(0, kMaxRepr) + "'; expected " + expected);
}

void read_scale_shift(OpSpec& op, const py::dict& d) {
  op.weight = get_floats(d, "scale");
  op.bias = get_floats(d, "shift");
}

void read_size(OpSpec& op, const py::dict& d) {
  const auto size = get<std::array<int64_t, 2>>(d, "size");
  op.size = {1, size[0], size[1]};
}

void read_reshape(OpSpec& op, const py::dict& d) {
  const auto shape = get<std::vector<int64_t>>(d, "shape");
  if (shape.size() == 1)
    op.size = {shape[0], 1, 1};
  else if (shape.size() == 3)
    op.size = {shape[0], shape[1], shape[2]};
  else
    fail("field 'shape' has " + std::to_string(shape.size()) + " sizes; expected 1 or 3");
}

// Where a convolution's kernel lies on its input, and what it adds.
void read_window(OpSpec& op, const py::dict& d) {
  op.stride = get<std::array<int64_t, 2>>(d, "stride");
  op.padding = get<std::array<int64_t, 4>>(d, "padding");
  op.dilation = get<std::array<int64_t, 2>>(d, "dilation");
  op.groups = get<int64_t>(d, "groups");
  const auto residual = get<std::optional<int64_t>>(d, "residual");
  if (residual && *residual < 0) fail("field 'residual' is " + std::to_string(*residual));
  op.residual = residual.value_or(-1);
}

void read_conv2d(OpSpec& op, const py::dict& d) {
  std::vector<int64_t> shape;
  op.weight = get_floats(d, "weight", &shape);
  check_axes<4>(shape, op.weight_shape, "conv2d");
  op.bias = get_floats(d, "bias");
  op.kernel = {shape[2], shape[3]};
  read_window(op, d);
}

void read_pool(OpSpec& op, const py::dict& d) {
  op.is_max = read_choice(d, "kind", {"average", "max"}) == 1;
  op.kernel = get<std::array<int64_t, 2>>(d, "kernel");
  op.stride = get<std::array<int64_t, 2>>(d, "stride");
  op.padding = get<std::array<int64_t, 4>>(d, "padding");
  op.ceil_mode = get<bool>(d, "ceil_mode");
  op.include_padding = get<bool>(d, "include_padding");
}

void read_linear(OpSpec& op, const py::dict& d) {
  std::vector<int64_t> shape;
  op.weight = get_floats(d, "weight", &shape);
  check_axes<2>(shape, op.weight_shape, "linear");
  op.weight_shape[2] = op.weight_shape[3] = 1;
  op.bias = get_floats(d, "bias");
}

// A field that must be a contiguous int8 array, as floats, which hold its integers exactly.
std::vector<float> get_bytes(const py::dict& d, const char* key, std::vector<int64_t>* shape) {
  using ByteArray = py::array_t<int8_t, py::array::c_style>;
  if (!d.contains(key) || !ByteArray::check_(d[key]))
    fail(std::string("field '") + key + "' must be a contiguous int8 array");
  const auto array = d[key].cast<ByteArray>();
  shape->assign(array.shape(), array.shape() + array.ndim());
  return {array.data(), array.data() + array.size()};
}

// Of int8_linear and int8_conv2d.
void read_byte_layer(OpSpec& op, const py::dict& d) {
  std::vector<int64_t> shape;
  op.weight = get_bytes(d, "weight", &shape);
  op.bias = get_floats(d, "bias");
  op.int8.multiplier = get_floats(d, "multiplier");
  op.int8.zero_point = get<int64_t>(d, "zero_point");
  op.int8.low = get<float>(d, "low");
  op.int8.high = get<float>(d, "high");
  op.int8.output_zero_point = get<std::optional<int64_t>>(d, "output_zero_point");
  op.int8.error = get<float>(d, "error");
  if (op.kind == OpKind::int8_linear) {
    check_axes<2>(shape, op.weight_shape, "int8 linear");
    op.weight_shape[2] = op.weight_shape[3] = 1;
    return;
  }
  check_axes<4>(shape, op.weight_shape, "int8 conv2d");
  op.kernel = {shape[2], shape[3]};
  op.int8.residual_scale = get<float>(d, "residual_scale");
  op.int8.residual_zero_point = get<int64_t>(d, "residual_zero_point");
  read_window(op, d);
}

OpSpec read_op(const py::dict& d) {
  static const std::map<std::string, OpKind> kinds = {{"Conv2d", OpKind::conv2d},
                                                      {"Pool", OpKind::pool},
                                                      {"Linear", OpKind::linear},
                                                      {"Add", OpKind::add},
                                                      {"Slice", OpKind::slice},
                                                      {"Activation", OpKind::activation},
                                                      {"ScaleShift", OpKind::scale_shift},
                                                      {"Pad", OpKind::pad},
                                                      {"Concat", OpKind::concat},
                                                      {"Flatten", OpKind::flatten},
                                                      {"AdaptivePool", OpKind::adaptive_pool},
                                                      {"Multiply", OpKind::multiply},
                                                      {"LayerNorm", OpKind::layer_norm},
                                                      {"Softmax", OpKind::softmax},
                                                      {"ChannelReduce", OpKind::channel_reduce},
                                                      {"Resize", OpKind::resize},
                                                      {"Reorder", OpKind::reorder},
                                                      {"Reshape", OpKind::reshape},
                                                      {"Quantize", OpKind::quantize},
                                                      {"Dequantize", OpKind::dequantize},
                                                      {"QuantizedConv2d", OpKind::int8_conv2d},
                                                      {"QuantizedLinear", OpKind::int8_linear}};
  const auto name = get<std::string>(d, "op");
  const auto found = kinds.find(name);
  if (found == kinds.end()) fail("unknown operation '" + name.substr(0, kMaxRepr) + "'");
  OpSpec op;
  op.kind = found->second;
  op.output = get<int64_t>(d, "output");
  op.inputs = get<std::vector<int64_t>>(d, "inputs");
  set_activation(op, d.contains("activation") ? get<std::string>(d, "activation") : "none");
  switch (op.kind) {
    case OpKind::conv2d: read_conv2d(op, d); break;
    case OpKind::pool: read_pool(op, d); break;
    case OpKind::linear: read_linear(op, d); break;
    case OpKind::int8_conv2d:
    case OpKind::int8_linear: read_byte_layer(op, d); break;
    case OpKind::quantize:
    case OpKind::dequantize:
      op.int8.scale = get<float>(d, "scale");
      op.int8.zero_point = get<int64_t>(d, "zero_point");
      break;
    case OpKind::activation: op.activation.parameter = get<float>(d, "parameter"); break;
    case OpKind::adaptive_pool:
      op.is_max = read_choice(d, "kind", {"average", "max"}) == 1;
      read_size(op, d);
      break;
    case OpKind::scale_shift: read_scale_shift(op, d); break;
    case OpKind::layer_norm:
      read_scale_shift(op, d);
      op.value = get<float>(d, "eps");
      break;
    case OpKind::softmax: op.parts = get<int64_t>(d, "parts"); break;
    case OpKind::channel_reduce: op.is_max = read_choice(d, "kind", {"mean", "max"}) == 1; break;
    case OpKind::resize:
      op.interpolation = static_cast<Interpolation>(read_choice(d, "kind", {"bilinear", "nearest", "bicubic"}));
      op.align_corners = get<bool>(d, "align_corners");
      op.antialias = d.contains("antialias") && get<bool>(d, "antialias");  // plans from before it have none
      read_size(op, d);
      break;
    case OpKind::reorder: op.channels = get<std::vector<int64_t>>(d, "channels"); break;
    case OpKind::reshape: read_reshape(op, d); break;
    case OpKind::slice:
      op.start = get<std::array<int64_t, 3>>(d, "start");
      op.stop = get<std::array<int64_t, 3>>(d, "stop");
      op.step = get<std::array<int64_t, 3>>(d, "step");
      break;
    case OpKind::pad:
      op.before = get<std::array<int64_t, 3>>(d, "before");
      op.after = get<std::array<int64_t, 3>>(d, "after");
      op.value = get<float>(d, "value");
      op.pad_mode = static_cast<PadMode>(read_choice(d, "mode", {"constant", "reflect", "replicate"}));
      break;
    default: break;
  }
  return op;
}

StageSpec read_stage(const py::dict& d) {
  static const std::map<std::string, StageInput> inputs = {
      {"image", StageInput::image}, {"previous", StageInput::previous}, {"features", StageInput::features}};
  StageSpec stage;
  stage.name = get<std::string>(d, "name");
  const auto input = get<std::string>(d, "input");
  const auto found = inputs.find(input);
  if (found == inputs.end()) fail("unknown input '" + input + "'; expected image, previous or features");
  stage.input_kind = found->second;
  const auto shape = get<std::array<int64_t, 3>>(d, "shape");
  stage.input = {shape[0], shape[1], shape[2]};
  stage.features = get<int64_t>(d, "features");
  stage.logits = get<int64_t>(d, "logits");
  stage.keeps_features = get<bool>(d, "keeps_features");
  for (const py::handle& op : get<py::list>(d, "ops")) stage.ops.push_back(read_op(as_dict(op, "an operation")));
  return stage;
}

Selector read_selector(const py::handle& item) {
  Selector s;
  if (item.is_none()) return s;
  const py::dict d = as_dict(item, "a selector");
  static const std::map<std::string, Score> scores = {{"stats", Score::mlp_stats}, {"topk", Score::mlp_topk},
                                                      {"probs", Score::mlp_probs}, {"max_prob", Score::max_prob},
                                                      {"margin", Score::margin},   {"entropy", Score::entropy}};
  const auto kind = get<std::string>(d, "score");
  const auto found = scores.find(kind);
  if (found == scores.end()) fail("unknown selector '" + kind.substr(0, kMaxRepr) + "'");
  s.score = found->second;
  if (!d.contains("w1")) return s;
  s.mean = get_floats(d, "mean");
  s.std = get_floats(d, "std");
  s.w1 = get_floats(d, "w1");
  s.b1 = get_floats(d, "b1");
  s.w2 = get_floats(d, "w2");
  s.b2 = get<float>(d, "b2");
  s.features = static_cast<int64_t>(s.mean.size());
  s.hidden = static_cast<int64_t>(s.b1.size());
  return s;
}

// ---- the cascade ----

// Runs `allocate`; where it finds no memory, says which batches may fit.
template <class Allocate>
auto allocate_batch(int64_t instances, Allocate allocate) {
  const auto too_large = [&] {
    return OutOfMemory("no memory is left for the results of " + std::to_string(instances) +
                       " images; try batches of " + std::to_string(std::max<int64_t>(1, instances / 2)));
  };
  try {
    return allocate();
  } catch (const py::error_already_set& error) {
    if (error.matches(PyExc_MemoryError)) throw too_large();
    throw;
  }
}

class Cascade {
 public:
  Cascade(const py::list& stages, const py::list& selectors, int64_t classes, const std::vector<float>& stage_weights,
          int threads, const std::string& isa, const std::string& kernel, const std::string& precision) {
    if (classes < 1 || classes > kMaxClasses) fail("classes is " + std::to_string(classes));
    if (precision != "fp32" && precision != "bf16")
      fail("precision is '" + precision.substr(0, kMaxRepr) + "'; expected fp32 or bf16");
    CascadeSpec spec;
    for (const py::handle& stage : stages) spec.stages.push_back(read_stage(as_dict(stage, "a stage")));
    for (const py::handle& selector : selectors) spec.selectors.push_back(read_selector(selector));
    spec.classes = classes;
    spec.stage_weights = stage_weights;
    spec.threads = threads;
    spec.in_bf16 = precision == "bf16";
    spec.isa = isa;
    spec.forced_kernel = kernel;
    py::gil_scoped_release release;
    executor_ = std::make_unique<Executor>(spec);
  }

  py::tuple run(const py::array& images, const std::optional<FloatArray>& table, const FloatArray& thresholds) const {
    const Images input = check_images(images, 0, table);
    check_thresholds(thresholds);
    check_batch_memory(input.count);
    auto [log_probs, label, exit_stage] = allocate_batch(input.count, [&] {
      return std::make_tuple(FloatArray({input.count, program().classes}), py::array_t<int64_t>(input.count),
                             py::array_t<int64_t>(input.count));
    });
    const Results results{log_probs.mutable_data(), label.mutable_data(), exit_stage.mutable_data()};
    {
      py::gil_scoped_release release;
      executor_->run(input, thresholds.data(), results);
    }
    return py::make_tuple(log_probs, label, exit_stage);
  }

  py::tuple run_stage(int64_t stage, const py::array& rows, const std::optional<FloatArray>& table) const {
    const size_t k = check_stage(stage);
    const Images input = check_images(rows, k, table);
    const Shape shape = program().features_shape(k);
    auto [logits, features] = allocate_batch(input.count, [&] {
      return std::make_tuple(FloatArray({input.count, program().classes}),
                             FloatArray({input.count, shape.c, shape.h, shape.w}));
    });
    float* logits_out = logits.mutable_data();
    float* features_out = shape.c ? features.mutable_data() : nullptr;
    {
      py::gil_scoped_release release;
      executor_->run_stage(k, input, logits_out, features_out);
    }
    return py::make_tuple(logits, shape.c ? py::object(features) : py::none());
  }

  py::list describe() const {
    py::list stages;
    for (const Network& net : program().networks) {
      py::list kernels;
      for (const Step& step : net.steps) kernels.append(py::make_tuple(step.operation, step.kernel));
      py::dict stage;
      stage["isa"] = program().kernels->isa;
      stage["kernels"] = kernels;
      stage["weight_bytes"] = net.weight_bytes;
      stage["arena_bytes"] = (net.arena_floats + net.scratch_floats) * 4;
      stage["tile"] = net.tile_instances;
      stages.append(stage);
    }
    return stages;
  }

  // Per step of a stage: (operation, kernel, macs, bytes, seconds), the last three per instance.
  py::list time_steps(int64_t stage, const py::array& rows, const std::optional<FloatArray>& table,
                      double seconds) const {
    const size_t k = check_stage(stage);
    const Network& net = program().networks[k];
    const Images input = check_images(rows, k, table);
    if (input.count == 0) fail("got 0 rows to time steps with, expected at least one");
    if (!(seconds >= 0)) fail("seconds is " + std::to_string(seconds) + ", expected 0 or more");
    std::vector<int64_t> index(static_cast<size_t>(std::min(input.count, net.tile_instances)));
    std::iota(index.begin(), index.end(), 0);
    const Source source{&input, nullptr, 0, index.data()};
    std::vector<StepTime> times;
    {
      py::gil_scoped_release release;
      times = fastcascade::time_steps(net, source, static_cast<int64_t>(index.size()),
                                      static_cast<int>(program().threads), seconds);
    }
    py::list list;
    for (size_t i = 0; i < times.size(); ++i) {
      const Step& step = net.steps[i];
      list.append(py::make_tuple(step.operation, step.kernel, step.macs, times[i].bytes, times[i].seconds));
    }
    return list;
  }

  int64_t memory_bytes() const { return program().buffer_bytes(program().threads); }

 private:
  std::unique_ptr<Executor> executor_;

  const Program& program() const { return executor_->program(); }

  size_t check_stage(int64_t stage) const {
    if (stage < 0 || stage >= static_cast<int64_t>(program().networks.size()))
      fail("stage " + std::to_string(stage) + " does not exist");
    return static_cast<size_t>(stage);
  }

  void check_thresholds(const FloatArray& thresholds) const {
    const int64_t expected = static_cast<int64_t>(program().networks.size()) - 1;
    if (thresholds.ndim() != 1 || thresholds.size() != expected)
      fail("thresholds have " + std::to_string(thresholds.size()) +
           " numbers, expected one for every stage but the last: " + std::to_string(expected));
    for (int64_t i = 0; i < expected; ++i)
      if (std::isnan(thresholds.data()[i])) fail("a threshold is NaN; expected numbers or infinity");
  }

  // Refuses a large batch before it takes memory that the machine does not have. Small ones are not worth the look.
  void check_batch_memory(int64_t instances) const {
    constexpr int64_t kSmallBytes = 64 << 20;
    const int64_t needed = program().batch_bytes(instances);
    if (needed <= kSmallBytes) return;
    const int64_t available = available_bytes();
    if (needed > available)
      throw OutOfMemory("the results of " + std::to_string(instances) + " images need " + bytes_text(needed) +
                        ", but " + bytes_text(available) + " are left; try batches of " +
                        std::to_string(instances / 2));
  }

  Images check_images(const py::array& images, size_t stage, const std::optional<FloatArray>& table) const {
    const Shape& shape = program().networks[stage].shape(0);
    if (images.ndim() != 4 || images.shape(1) != shape.c || images.shape(2) != shape.h || images.shape(3) != shape.w)
      fail("expected an array of shape (N, " + std::to_string(shape.c) + ", " + std::to_string(shape.h) + ", " +
           std::to_string(shape.w) + "), got " + py::str(images.attr("shape")).cast<std::string>());
    const bool bytes = py::isinstance<py::array_t<uint8_t>>(images);
    if (!bytes && !py::isinstance<py::array_t<float>>(images))
      fail("expected float32 or uint8, got " + py::str(images.dtype()).cast<std::string>());
    if (bytes && (!table || table->ndim() != 2 || table->shape(0) != shape.c || table->shape(1) != 256))
      fail("uint8 images need a table of shape (" + std::to_string(shape.c) + ", 256)");
    Images input{images.data(), bytes, bytes ? table->data() : nullptr, images.shape(0), {}};
    for (int axis = 0; axis < 4; ++axis) {
      if (images.strides(axis) % images.itemsize()) fail("strides are not whole elements");
      input.strides[axis] = images.strides(axis) / images.itemsize();
    }
    return input;
  }
};

// (name, why it cannot run here or None).
py::tuple availability(const std::string& name, bool here, const char* needs) {
  return py::make_tuple(name, here ? py::object(py::none()) : py::object(py::str(std::string("it needs ") + needs)));
}

// Best first.
py::list instruction_sets() {
  py::list list;
  for (const Isa& isa : isas()) list.append(availability(isa.name, isa.table && isa.supported(), isa.needs));
  return list;
}

py::list int8_kernels() {
  py::list list;
  for (const Int8Isa& isa : int8_isas())
    list.append(availability(kInt8Prefix + std::string(isa.name), isa.kernels && isa.supported(), isa.needs));
  return list;
}

// Why precision "bf16" cannot run here on an instruction set, or None.
py::object bf16_refusal_here(const std::string& isa) {
  const std::string refusal = bf16_refusal(choose_isa(isa));
  return refusal.empty() ? py::object(py::none()) : py::object(py::str(refusal));
}

}  // namespace
}  // namespace fastcascade

PYBIND11_MODULE(_C, m) {
  using namespace fastcascade;
  m.doc() = "The CPU engine. Use it through fastcascade.backends.cpu.";
  m.def("instruction_sets", &instruction_sets);
  m.def("int8_kernels", &int8_kernels);
  m.def("bf16_refusal", &bf16_refusal_here, py::arg("isa") = "");
  m.def("chosen_isa", [](const std::string& name) { return choose_isa(name).isa; }, py::arg("name") = "");
  py::class_<Cascade>(m, "Cascade")
      .def(py::init<const py::list&, const py::list&, int64_t, const std::vector<float>&, int, const std::string&,
                    const std::string&, const std::string&>(),
           py::arg("stages"), py::arg("selectors"), py::arg("classes"), py::kw_only(),
           py::arg("stage_weights") = std::vector<float>(), py::arg("threads") = 1, py::arg("isa") = "",
           py::arg("kernel") = "", py::arg("precision") = "fp32")
      .def("run", &Cascade::run, py::arg("images"), py::arg("table"), py::arg("thresholds").noconvert())
      .def("run_stage", &Cascade::run_stage, py::arg("stage"), py::arg("rows"), py::arg("table") = py::none())
      .def("time_steps", &Cascade::time_steps, py::arg("stage"), py::arg("rows"), py::arg("table"), py::arg("seconds"))
      .def("describe", &Cascade::describe)
      .def("memory_bytes", &Cascade::memory_bytes);
}
