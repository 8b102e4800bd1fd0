// Products for any processor.
#include <cstring>
#include "weight.h"
namespace portable {
#include "engine.h"
#include "inputs.h"
#include "generic.h"
#include "quantize.h"
}
