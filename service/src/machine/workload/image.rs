//! The guest program, in assembly: 64-bit code at CPL 3 with IOPL 3, plus the few 32-bit instructions that get there from a PVH
//! entry. Position-independent except for the far jump and the return, which know [`PROGRAM_GPA`].
//!
//! ```text
//! entry64 (rdi = vCPU): greet -> write fill -> passes over the slice, for ever
//! page:   verify the last pass's stamps -> write this pass's -> heartbeat -> now and then check a fill page -> wait if early
//! page of vCPU 0: a step of work on the disk (`disk.rs`) and on the network interface (`net.rs`), if there are any
//! pass:   say on the serial port that it ends -> send to serial ports that echo, and check what comes back
//! ```
//!
//! Registers that live throughout: r15 parameters, r14 mailbox, r13 pass (from 1), r12 data page index, r11 TSC at which the current
//! batch is due, r10 pages left in the batch, rbp next fill page to check, rbx address of the current page. The rest is scratch.
//! The stack is the upper end of the mailbox page, which is dirty all the time anyway.

#![expect(
    unsafe_code,
    reason = "assembles the guest program into our read-only data and reads it from there"
)]

use std::slice;

use super::layout::{
    DISK_GPA, MAILBOX_GPA, NET_GPA, NO_INTERRUPT, PAGE_BYTES, PAGE_TABLES_GPA, PARAMS_GPA,
    PROGRAM_GPA, WORKING_SET_GPA, disk, mailbox, net, params, port,
};
use super::loader::{CODE64, GDT_POINTER_GPA, STUB_STACK_GPA, TSS, USER_CODE64, USER_DATA};
use super::pattern;
use crate::machine::vfio::window;

/// Bits that RFLAGS has when the program starts: the one that is always set, and IOPL 3. Interrupts stay off.
pub const RFLAGS: u64 = 0x3002;

std::arch::global_asm!(
    concat!(r#"
    .pushsection .rodata.vmferry_workload, "a"
    .balign 16
    .globl vmferry_workload_start
    .hidden vmferry_workload_start
    .globl vmferry_workload_entry64
    .hidden vmferry_workload_entry64
    .globl vmferry_workload_end
    .hidden vmferry_workload_end

vmferry_workload_start:

    // ---- PVH entry: 32-bit protected mode, paging off. Everything it needs was loaded with the program.
    .code32
    cli
    lgdt [{GDT_POINTER}]
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, {PAGE_TABLES}
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    mov cr0, eax
    // Far jump to 64-bit code, written out: opcode, offset, selector.
    .byte 0xea
    .long {PROGRAM} + 20f - vmferry_workload_start
    .word {CODE64}

    .code64
20:
    xor eax, eax
    mov ss, ax
    mov ax, {USER_DATA}
    mov ds, ax
    mov es, ax
    // The TSS allows the program's ports.
    mov ax, {TSS}
    ltr ax
    mov esp, {STUB_STACK}
    push {USER_DATA}
    push {MAILBOX} + {PAGE}
    push {RFLAGS}
    push {USER_CODE64}
    // Push of a 32-bit constant, written out.
    .byte 0x68
    .long {PROGRAM} + vmferry_workload_entry64 - vmferry_workload_start
    xor edi, edi
    iretq

    // ---- Program. In: rdi = vCPU number, rsp = end of its mailbox page.
    .balign 16
vmferry_workload_entry64:
    cld
    mov r15d, {PARAMS}
    mov r14, rdi
    shl r14, 12
    add r14, {MAILBOX}

    mov edx, {SLEEP_PORT}
    in eax, dx
    xor ecx, ecx
    cmp eax, {SLEEP_PRESENT}
    sete cl
    mov [r14 + {CAN_SLEEP}], rcx

    test edi, edi
    jnz 31f
    lea rsi, [rip + 90f]
    mov edx, {SERIAL_PORT}
30: mov al, [rsi]
    test al, al
    jz 29f
    out dx, al
    inc rsi
    jmp 30b
29: call 70f
    call 80f
31:
    // Fill.
    mov qword ptr [r14 + {PHASE}], {PHASE_FILL}
    mov rbp, [r14 + {FILL_FIRST}]
32: cmp rbp, [r14 + {FILL_END}]
    jae 33f
    mov rax, rbp
    call 60f
    call 61f
    call 62f
    inc qword ptr [r14 + {FILLED_PAGES}]
    inc rbp
    jmp 32b
33:
    // First pass.
    mov qword ptr [r14 + {PHASE}], {PHASE_FIRST_PASS}
    mov r13d, 1
    mov rbp, [r14 + {FILL_FIRST}]
    mov rax, [r15 + {FILL_CHECK_EVERY}]
    mov [r14 + {FILL_CHECK_IN}], rax
    mov r10, [r15 + {BATCH_PAGES}]
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov [r14 + {HEARTBEAT}], rax
    mov r11, rax
    add r11, [r15 + {BATCH_TICKS}]

40: // Pass.
    mov r12, [r14 + {SLICE_FIRST}]

41: // Page. rsi = first stamp of this pass, r8 = first stamp of the last pass.
    mov rax, r12
    call 60f
    movabs rcx, {STAMP_PAGE}
    imul rax, rcx
    movabs rcx, {STAMP_PASS}
    mov rsi, r13
    imul rsi, rcx
    add rsi, rax
    movabs rdi, {STAMP_WORD}
    cmp r13, 1
    je 44f
    mov r8, rsi
    sub r8, rcx
    xor ecx, ecx
42: mov rdx, [rbx + rcx]
    cmp rdx, r8
    jne 43f
    add r8, rdi
    add ecx, {STRIDE}
    cmp ecx, {PAGE}
    jb 42b
    jmp 44f
43: lea r9, [rbx + rcx]
    call 63f
44: xor ecx, ecx
45: mov [rbx + rcx], rsi
    add rsi, rdi
    add ecx, {STRIDE}
    cmp ecx, {PAGE}
    jb 45b

    // Heartbeat: rdx = gap, rcx = request to forget.
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rdx, rax
    mov r8, [r14 + {HEARTBEAT}]
    mov [r14 + {HEARTBEAT}], rax
    inc qword ptr [r14 + {PAGES_WRITTEN}]
    mov rcx, [r14 + {RESET_REQUESTED}]
    cmp rcx, [r14 + {RESET_DONE}]
    je 46f
    mov qword ptr [r14 + {LONGEST_GAP}], 0
    mov [r14 + {RESET_DONE}], rcx
    jmp 47f
46: cmp r13, 1
    je 47f
    sub rdx, r8
    // A clock that went back has no gap to tell.
    jb 47f
    cmp rdx, [r14 + {LONGEST_GAP}]
    jbe 47f
    mov [r14 + {LONGEST_GAP}], rdx
47:
    // One page of the fill every now and then.
    dec qword ptr [r14 + {FILL_CHECK_IN}]
    jnz 48f
    mov rax, [r15 + {FILL_CHECK_EVERY}]
    mov [r14 + {FILL_CHECK_IN}], rax
    call 64f
48:
    // A step of work on the disk.
    cmp qword ptr [r15 + {DISK_WINDOW}], 0
    je 55f
    test r14, {VCPU_NOT_0}
    jnz 55f
    call 71f
55:
    // A step of work on the network interface.
    cmp qword ptr [r15 + {NET_WINDOW}], 0
    je 56f
    test r14, {VCPU_NOT_0}
    jnz 56f
    call 81f
56:
    // Rate.
    cmp qword ptr [r15 + {BATCH_PAGES}], 0
    je 49f
    dec r10
    jnz 49f
    mov r10, [r15 + {BATCH_PAGES}]
    call 65f
    add r11, [r15 + {BATCH_TICKS}]
49: inc r12
    cmp r12, [r14 + {SLICE_END}]
    jb 41b

    // End of a pass. vCPU 0 sends its number to each serial port that echoes: that of some passes ago comes back.
    test r14, {VCPU_NOT_0}
    jnz 52f
    cmp qword ptr [r15 + {SERIAL_PASSES}], 0
    je 53f
    mov eax, r13d
    and eax, {SERIAL_DIGITS} - 1
    add eax, {SERIAL_DIGIT_0}
    mov edx, {SERIAL_PORT}
    out dx, al
53: mov rsi, [r15 + {ECHOES}]
    mov ebx, {WINDOWS}
50: test rsi, rsi
    jz 52f
    test esi, 1
    jz 51f
    mov eax, r13d
    mov [rbx], al
    mov r8, r13
    sub r8, {ECHO_DEPTH}
    jbe 51f
    movzx r8d, r8b
    xor edx, edx
    mov dl, [rbx]
    cmp rdx, r8
    je 51f
    mov r9, rbx
    call 63f
51: add rbx, {DEVICE_BYTES}
    shr rsi, 1
    jmp 50b
52:
    mov [r14 + {PASSES}], r13
    inc r13
    mov qword ptr [r14 + {PHASE}], {PHASE_STEADY}
    mov rax, [r15 + {EXIT_AFTER_PASSES}]
    test rax, rax
    jz 40b
    cmp r13, rax
    jbe 40b
    test r14, {VCPU_NOT_0}
    jnz 40b
    mov edx, {EXIT_PORT}
    xor eax, eax
    out dx, al
    jmp 40b

60: // In: rax = data page index. Out: rax = page number, rbx = address.
    add rax, {WORKING_SET_PAGE}
    cmp rax, [r15 + {LOW_END_PAGE}]
    jb 1f
    add rax, [r15 + {HOLE_PAGES}]
1:  mov rbx, rax
    shl rbx, 12
    ret

61: // In: rax = page number. Out: rax = counter of its first fill word, rsi = step of the counter, rdi = multiplier.
    movabs rsi, {FILL_STEP}
    shl rax, 9
    imul rax, rsi
    movabs rdi, {FILL_SEED}
    add rax, rdi
    movabs rdi, {FILL_MIX}
    ret

62: // Writes the fill page at rbx; rax, rsi, rdi as made by 61.
    xor ecx, ecx
1:  mov r8, rax
    shr r8, 32
    xor r8, rax
    imul r8, rdi
    mov r9, r8
    shr r9, 29
    xor r8, r9
    mov [rbx + rcx * 8], r8
    add rax, rsi
    inc ecx
    cmp ecx, {FILL_WORDS}
    jb 1b
    ret

63: // A wrong word. In: r9 = its address, r8 = what it should be, rdx = what it is.
    inc qword ptr [r14 + {ERRORS}]
    cmp qword ptr [r14 + {FIRST_ERROR_GPA}], 0
    jne 1f
    mov [r14 + {FIRST_ERROR_GPA}], r9
    mov [r14 + {FIRST_ERROR_EXPECTED}], r8
    mov [r14 + {FIRST_ERROR_FOUND}], rdx
1:  ret

64: // Checks the fill page at index rbp and steps on: all words of every 16th page, else every 64th word.
    mov rax, [r14 + {FILL_FIRST}]
    cmp rax, [r14 + {FILL_END}]
    je 5f
    mov rax, rbp
    call 60b
    call 61b
    mov edx, 64
    test qword ptr [r14 + {FILL_CHECKED}], 15
    jnz 1f
    mov edx, 1
1:  mov [r14 + {CHECK_STRIDE}], rdx
    imul rsi, rdx
    xor ecx, ecx
2:  mov r8, rax
    shr r8, 32
    xor r8, rax
    imul r8, rdi
    mov r9, r8
    shr r9, 29
    xor r8, r9
    mov rdx, [rbx + rcx * 8]
    cmp rdx, r8
    jne 3f
    add rax, rsi
    add rcx, [r14 + {CHECK_STRIDE}]
    cmp ecx, {FILL_WORDS}
    jb 2b
    jmp 4f
3:  lea r9, [rbx + rcx * 8]
    call 63b
4:  inc qword ptr [r14 + {FILL_CHECKED}]
    inc rbp
    cmp rbp, [r14 + {FILL_END}]
    jb 5f
    mov rbp, [r14 + {FILL_FIRST}]
5:  ret

65: // Waits until r11. Time slept up to then is no gap: the heartbeat moves to r11. Oversleeping stays one.
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rcx, r11
    sub rcx, rax
    jle 4f
    // Due in the far future: the clock has jumped. Start a new schedule.
    mov rdx, [r15 + {BATCH_TICKS}]
    shl rdx, 1
    cmp rcx, rdx
    ja 6f
1:  cmp qword ptr [r14 + {CAN_SLEEP}], 0
    je 2f
    imul rax, rcx, 1000
    xor edx, edx
    div qword ptr [r15 + {TSC_KHZ}]
    // A sleep shorter than an exit is not worth one.
    cmp rax, {SLEEP_MIN_US}
    jb 2f
    mov edx, {SLEEP_PORT}
    out dx, eax
    jmp 3f
2:  pause
3:  rdtsc
    shl rdx, 32
    or rax, rdx
    mov rcx, r11
    sub rcx, rax
    jle 7f
    mov rdx, [r15 + {BATCH_TICKS}]
    shl rdx, 1
    cmp rcx, rdx
    jbe 1b
    jmp 6f
7:  mov [r14 + {HEARTBEAT}], r11
    // Late. By more than a few batches: do not try to make up for it.
4:  neg rcx
    mov rdx, [r15 + {BATCH_TICKS}]
    shl rdx, 4
    cmp rcx, rdx
    jbe 5f
6:  mov r11, rax
5:  ret

"#, super::disk::disk_program!(), super::net::net_program!(), r#"
90: .asciz "vmferry workload started\r\n"
    .balign 16
vmferry_workload_end:
    .popsection
    "#),
    GDT_POINTER = const GDT_POINTER_GPA,
    PAGE_TABLES = const PAGE_TABLES_GPA,
    PROGRAM = const PROGRAM_GPA,
    CODE64 = const CODE64,
    TSS = const TSS,
    USER_DATA = const USER_DATA,
    USER_CODE64 = const USER_CODE64,
    STUB_STACK = const STUB_STACK_GPA,
    RFLAGS = const RFLAGS,
    PARAMS = const PARAMS_GPA,
    MAILBOX = const MAILBOX_GPA,
    PAGE = const PAGE_BYTES,
    SLEEP_PORT = const port::SLEEP,
    SLEEP_PRESENT = const port::SLEEP_PRESENT,
    SLEEP_MIN_US = const SLEEP_MIN_US,
    SERIAL_PORT = const port::SERIAL,
    EXIT_PORT = const port::EXIT,
    WORKING_SET_PAGE = const WORKING_SET_GPA / PAGE_BYTES,
    VCPU_NOT_0 = const VCPU_NOT_0,
    LOW_END_PAGE = const params::LOW_END_PAGE,
    HOLE_PAGES = const params::HOLE_PAGES,
    BATCH_PAGES = const params::BATCH_PAGES,
    BATCH_TICKS = const params::BATCH_TICKS,
    TSC_KHZ = const params::TSC_KHZ,
    FILL_CHECK_EVERY = const params::FILL_CHECK_EVERY,
    EXIT_AFTER_PASSES = const params::EXIT_AFTER_PASSES,
    ECHOES = const params::ECHOES,
    SERIAL_PASSES = const params::SERIAL_PASSES,
    SERIAL_DIGITS = const params::SERIAL_DIGITS,
    SERIAL_DIGIT_0 = const params::SERIAL_DIGIT_0,
    DISK_WINDOW = const params::DISK_WINDOW,
    DISK_WRITTEN = const mailbox::DISK_WRITTEN,
    DISK_CHECKED = const mailbox::DISK_CHECKED,
    DISK_ERRORS = const mailbox::DISK_ERRORS,
    DISK = const DISK_GPA,
    DISK_DESC = const disk::DESC,
    DISK_AVAIL = const disk::AVAIL,
    DISK_USED = const disk::USED,
    DISK_HEADER = const disk::HEADER,
    DISK_STATUS = const disk::STATUS,
    DISK_BLOCKS = const disk::BLOCKS,
    DISK_BLOCK = const disk::BLOCK,
    DISK_STEP = const disk::STEP,
    DISK_SUBMITTED = const disk::SUBMITTED,
    DISK_DATA = const disk::DATA,
    DISK_GENERATIONS = const disk::GENERATIONS,
    DISK_QUEUE_SIZE = const disk::QUEUE_SIZE,
    STEP_IDLE = const disk::STEP_IDLE,
    STEP_READ = const disk::STEP_READ,
    STEP_WRITE = const disk::STEP_WRITE,
    BLOCKS_MAX = const disk::BLOCKS_MAX,
    DESC_HEADER = const disk::DESC_HEADER,
    DESC_DATA = const disk::DESC_DATA,
    DESC_STATUS = const disk::DESC_STATUS,
    DESC_WRITE = const disk::DESC_WRITE,
    NO_INTERRUPT = const NO_INTERRUPT,
    REQUEST_READ = const disk::REQUEST_READ,
    REQUEST_WRITE = const disk::REQUEST_WRITE,
    NET_WINDOW = const params::NET_WINDOW,
    NET = const NET_GPA,
    TO_DESC = const net::TO_DESC,
    TO_AVAIL = const net::TO_AVAIL,
    TO_USED = const net::TO_USED,
    FROM_DESC = const net::FROM_DESC,
    FROM_AVAIL = const net::FROM_AVAIL,
    FROM_USED = const net::FROM_USED,
    NET_READY = const net::READY,
    NET_SEEN = const net::SEEN,
    NET_OFFERED = const net::OFFERED,
    NET_SENT = const net::SENT,
    NET_HELD = const net::HELD,
    NET_BUFFERS = const net::BUFFERS,
    NET_QUEUE_SIZE = const net::QUEUE_SIZE,
    BUFFER_BYTES = const net::BUFFER_BYTES,
    BUFFER_SHIFT = const net::BUFFER_SHIFT,
    TO_DESC_REST = const net::TO_DESC_REST,
    TO_AVAIL_0 = const net::TO_AVAIL_0,
    TO_AVAIL_1 = const net::TO_AVAIL_1,
    TO_AVAIL_2 = const net::TO_AVAIL_2,
    ETHER_TYPE = const net::ETHER_TYPE,
    ETHER_IPV4 = const net::ETHER_IPV4,
    IP_ADDRESSES = const net::IP_ADDRESSES,
    UDP_PORTS = const net::UDP_PORTS,
    ANSWER_BYTES_MIN = const net::ANSWER_BYTES_MIN,
    ECHO_DEPTH = const params::ECHO_DEPTH,
    WINDOWS = const window::WINDOWS_GPA,
    DEVICE_BYTES = const window::DEVICE_BYTES,
    PHASE = const mailbox::PHASE,
    PHASE_FILL = const mailbox::PHASE_FILL,
    PHASE_FIRST_PASS = const mailbox::PHASE_FIRST_PASS,
    PHASE_STEADY = const mailbox::PHASE_STEADY,
    PASSES = const mailbox::PASSES,
    PAGES_WRITTEN = const mailbox::PAGES_WRITTEN,
    ERRORS = const mailbox::ERRORS,
    FIRST_ERROR_GPA = const mailbox::FIRST_ERROR_GPA,
    FIRST_ERROR_EXPECTED = const mailbox::FIRST_ERROR_EXPECTED,
    FIRST_ERROR_FOUND = const mailbox::FIRST_ERROR_FOUND,
    HEARTBEAT = const mailbox::HEARTBEAT_TSC,
    LONGEST_GAP = const mailbox::LONGEST_GAP_TICKS,
    RESET_REQUESTED = const mailbox::RESET_REQUESTED,
    RESET_DONE = const mailbox::RESET_DONE,
    FILLED_PAGES = const mailbox::FILLED_PAGES,
    FILL_CHECKED = const mailbox::FILL_CHECKED,
    SLICE_FIRST = const mailbox::SLICE_FIRST,
    SLICE_END = const mailbox::SLICE_END,
    FILL_FIRST = const mailbox::FILL_FIRST,
    FILL_END = const mailbox::FILL_END,
    CAN_SLEEP = const CAN_SLEEP,
    FILL_CHECK_IN = const FILL_CHECK_IN,
    CHECK_STRIDE = const CHECK_STRIDE,
    STAMP_PAGE = const pattern::STAMP_PAGE,
    STAMP_PASS = const pattern::STAMP_PASS,
    STAMP_WORD = const pattern::STAMP_WORD,
    STRIDE = const pattern::STAMP_STRIDE_BYTES,
    FILL_STEP = const pattern::FILL_STEP,
    FILL_SEED = const pattern::FILL_SEED,
    FILL_MIX = const pattern::FILL_MIX,
    FILL_WORDS = const pattern::FILL_WORDS_PER_PAGE,
);

/// Shortest time to wait by the sleep port, in microseconds; below it the program spins.
const SLEEP_MIN_US: u64 = 20;
/// Bits of a mailbox address that are clear for vCPU 0 only.
const VCPU_NOT_0: u64 = 0x3_f000;
// The program's own variables in the mailbox page.
const CAN_SLEEP: u64 = 0x900;
const FILL_CHECK_IN: u64 = 0x908;
const CHECK_STRIDE: u64 = 0x910;

unsafe extern "C" {
    static vmferry_workload_start: u8;
    static vmferry_workload_entry64: u8;
    static vmferry_workload_end: u8;
}

/// The program's bytes, to be placed at [`PROGRAM_GPA`]. The first is the PVH entry.
pub fn program() -> &'static [u8] {
    let start = &raw const vmferry_workload_start;
    let len = (&raw const vmferry_workload_end).addr() - start.addr();
    // SAFETY: both symbols are labels around one contiguous piece of a read-only section that nothing else is placed in between,
    // so the bytes exist, are initialised, never change and live as long as the process.
    unsafe { slice::from_raw_parts(start, len) }
}

/// Address of the first 64-bit instruction, to be entered at CPL 3 with the vCPU's number in RDI.
pub fn entry64_gpa() -> u64 {
    let offset =
        (&raw const vmferry_workload_entry64).addr() - (&raw const vmferry_workload_start).addr();
    PROGRAM_GPA + offset as u64
}

/// Address of the 32-bit PVH entry.
pub fn entry32_gpa() -> u64 {
    PROGRAM_GPA
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::workload::layout::{PROGRAM_BYTES_MAX, VCPUS_MAX, mailbox_gpa};

    #[test]
    fn program_fits_its_place_and_starts_with_the_pvh_entry() {
        let bytes = program();
        assert!(bytes.len() as u64 <= PROGRAM_BYTES_MAX);
        assert_eq!(bytes[0], 0xfa, "cli");
        let entry = usize::try_from(entry64_gpa() - PROGRAM_GPA).unwrap();
        assert_eq!(bytes[entry], 0xfc, "cld");
    }

    #[test]
    fn vcpu_0_is_told_by_its_mailbox_address() {
        assert_eq!(mailbox_gpa(0) & VCPU_NOT_0, 0);
        assert!((1..VCPUS_MAX).all(|vcpu| mailbox_gpa(vcpu) & VCPU_NOT_0 != 0));
    }
}
