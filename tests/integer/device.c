/* The network on a Cortex-M: output codes of all samples as hexadecimal digits on the debugger's console. */
#include "net.h"
#include "samples.h"

extern unsigned stack_top;
void start(void);

__attribute__((section(".vectors"), used)) static void *const vectors[] = { &stack_top, (void *)start };

static void put(char c)
{
    register int operation __asm__("r0") = 3; /* SYS_WRITEC */
    register const char *at __asm__("r1") = &c;
    __asm__ volatile("bkpt 0xab" : "+r"(operation) : "r"(at) : "memory");
}

static void leave(void)
{
    register int operation __asm__("r0") = 0x18; /* SYS_EXIT */
    register int reason __asm__("r1") = 0x20026;
    __asm__ volatile("bkpt 0xab" : "+r"(operation) : "r"(reason) : "memory");
}

void start(void)
{
    static int32_t arena[(NET_ARENA_BYTES + 3) / 4];
    static int8_t output[NET_OUTPUT_BYTES];
    unsigned first, i;
    for (first = 0; first < sizeof samples; first += NET_INPUT_BYTES) {
        if (net_run(samples + first, output, arena, sizeof arena))
            break;
        for (i = 0; i < sizeof output; i++) {
            put("0123456789abcdef"[(output[i] >> 4) & 15]);
            put("0123456789abcdef"[output[i] & 15]);
        }
    }
    leave();
    for (;;)
        ;
}
