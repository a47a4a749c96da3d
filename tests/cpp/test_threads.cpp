// Loops on threads of our own: nothing has loaded an OpenMP runtime here.
#include "loops.hpp"

int main() {
  CHECK(e2e::runtime() == e2e::Runtime::own);
  loops_hold();
  return failures();
}
