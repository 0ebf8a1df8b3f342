// Tile instructions on a machine without AMX, for tests: each raises SIGILL, and a signal handler does what it should have
// done. So the very machine code that runs where there are tiles is proven where there are none.
#pragma once

namespace mpillama {

// From now on, in all threads, unless someone else takes the signal. Does nothing on other systems than Linux on x86-64.
void trap_tiles();

bool tiles_trapped();

}  // namespace mpillama
