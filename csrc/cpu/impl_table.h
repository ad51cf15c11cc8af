// The function table of one instruction set. Included inside its namespace, after the implementations.

template <class T>
constexpr Kernels<T> kTable = {
    pack<T>,        expand_row<T>, rms_norm<T>,  linear<T>, swiglu<T>, head<T>,    rope<T>,       attend<T>,
    attend_rows<T>, combine<T>,    softmax_part, softmax,   pick_part, uniform_of, loss_terms<T>, loss_slopes<T>,
};
