// Products for any processor.
#include <cstring>
#include "attention.h"
#include "steps.h"
namespace portable {
#include "engine.h"
#include "inputs.h"
#include "generic.h"
#include "quantize.h"
#include "plain.h"
#include "elementwise.h"
#include "attention_head.h"
}
