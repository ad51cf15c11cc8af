// Empty module for packages on the Hugging Face hub: importing it in `_ops.py` registers the ops.
#include <Python.h>

#define LSK_JOINED(one, other) one##other
#define LSK_JOIN(one, other) LSK_JOINED(one, other)
#define LSK_QUOTED(name) #name
#define LSK_NAME(name) LSK_QUOTED(name)

PyMODINIT_FUNC LSK_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, LSK_NAME(TORCH_EXTENSION_NAME), nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
