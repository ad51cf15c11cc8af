// The function table of one instruction set. Included inside its namespace, after the implementations.

template <class T>
constexpr Kernels<T> kTable = {
    pack<T, typename Dot<T>::X>,
    pack<T, float>,
    rms_norm<T>,
    linear<T>,
    swiglu<T>,
    head<T>,
    head<int8_t>,
    rope<T>,
    attend<T>,
    combine<T>,
    softmax_part,
    softmax,
    pick_part,
    uniform_of,
    loss_terms<T>,
    loss_slopes<T>,
};
