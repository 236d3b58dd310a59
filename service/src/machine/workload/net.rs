//! The part of the guest program that answers on a network interface, in assembly; `image` puts it into the program. Each UDP packet over
//! IPv4 goes back to where it came from, as it is: addresses and ports change places, which leaves all checksums right. Where its memory
//! is laid out is told in [`layout::net`](super::layout::net).
//!
//! The device is polled: once for each page that vCPU 0 writes. One packet at a time goes back; the others wait in their buffers.

/// Subroutines 80 (sets the interface up) and 81 (one step of work, without waiting), with the registers of those for the disk.
macro_rules! net_program {
    () => {
        r#"
80: // Sets up the device, if there is one.
    mov rbx, [r15 + {NET_WINDOW}]
    test rbx, rbx
    jz 9f
    mov edi, {NET}
    mov dword ptr [rbx + 0x70], 0
    mov dword ptr [rbx + 0x70], 3
    // VERSION_1 and nothing else.
    mov dword ptr [rbx + 0x24], 1
    mov dword ptr [rbx + 0x20], 1
    mov dword ptr [rbx + 0x24], 0
    mov dword ptr [rbx + 0x20], 0
    mov dword ptr [rbx + 0x70], 11
    // The queues: to the guest, from it.
    mov dword ptr [rbx + 0x30], 0
    mov dword ptr [rbx + 0x38], {NET_QUEUE_SIZE}
    mov dword ptr [rbx + 0x80], {NET} + {TO_DESC}
    mov dword ptr [rbx + 0x84], 0
    mov dword ptr [rbx + 0x90], {NET} + {TO_AVAIL}
    mov dword ptr [rbx + 0x94], 0
    mov dword ptr [rbx + 0xa0], {NET} + {TO_USED}
    mov dword ptr [rbx + 0xa4], 0
    mov dword ptr [rbx + 0x44], 1
    mov dword ptr [rbx + 0x30], 1
    mov dword ptr [rbx + 0x38], {NET_QUEUE_SIZE}
    mov dword ptr [rbx + 0x80], {NET} + {FROM_DESC}
    mov dword ptr [rbx + 0x84], 0
    mov dword ptr [rbx + 0x90], {NET} + {FROM_AVAIL}
    mov dword ptr [rbx + 0x94], 0
    mov dword ptr [rbx + 0xa0], {NET} + {FROM_USED}
    mov dword ptr [rbx + 0xa4], 0
    mov dword ptr [rbx + 0x44], 1
    mov dword ptr [rbx + 0x70], 15
    // A buffer for each entry of the first, and all of them offered.
    lea rax, [rdi + {NET_BUFFERS}]
    lea rdx, [rdi + {TO_DESC}]
    movabs rcx, {TO_DESC_REST}
    mov esi, {NET_QUEUE_SIZE}
1:  mov [rdx], rax
    mov [rdx + 8], rcx
    add rax, {BUFFER_BYTES}
    add rdx, 16
    dec esi
    jnz 1b
    movabs rax, {TO_AVAIL_1}
    mov [rdi + {TO_AVAIL} + 8], rax
    mov qword ptr [rdi + {TO_AVAIL} + 16], {TO_AVAIL_2}
    mov qword ptr [rdi + {NET_OFFERED}], {NET_QUEUE_SIZE} - 1
    mov qword ptr [rdi + {NET_READY}], 1
    jmp 83f

81: // A step.
    mov edi, {NET}
    cmp qword ptr [rdi + {NET_READY}], 0
    je 9f
    cmp qword ptr [rdi + {NET_HELD}], 0
    je 82f
    // Has it left?
    movzx eax, word ptr [rdi + {FROM_USED} + 2]
    mov rcx, [rdi + {NET_SENT}]
    cmp ax, cx
    jne 9f
    mov qword ptr [rdi + {NET_HELD}], 0
    call 83f
82: // Has one come?
    movzx eax, word ptr [rdi + {TO_USED} + 2]
    mov rcx, [rdi + {NET_SEEN}]
    cmp ax, cx
    je 9f
    inc qword ptr [rdi + {NET_SEEN}]
    and ecx, {NET_QUEUE_SIZE} - 1
    lea r9, [rdi + {TO_USED} + 4 + rcx * 8]
    mov rsi, [r9]
    mov edx, esi
    mov r8d, ecx
    cmp edx, ecx
    je 1f
    // Buffers are filled in the order in which they were offered.
    call 63b
    jmp 83f
1:  shr rsi, 32
    shl ecx, {BUFFER_SHIFT}
    lea rbx, [rdi + {NET_BUFFERS} + rcx]
    cmp esi, {ANSWER_BYTES_MIN}
    jb 83f
    cmp word ptr [rbx + {ETHER_TYPE}], {ETHER_IPV4}
    jne 83f
    mov qword ptr [rbx], 0
    mov dword ptr [rbx + 8], 0
    mov eax, [rbx + 12]
    mov ecx, [rbx + 18]
    mov [rbx + 12], ecx
    mov [rbx + 18], eax
    mov ax, [rbx + 16]
    mov cx, [rbx + 22]
    mov [rbx + 16], cx
    mov [rbx + 22], ax
    rol qword ptr [rbx + {IP_ADDRESSES}], 32
    rol dword ptr [rbx + {UDP_PORTS}], 16
    mov [rdi + {FROM_DESC}], rbx
    mov [rdi + {FROM_DESC} + 8], rsi
    mov rax, [rdi + {NET_SENT}]
    inc rax
    mov [rdi + {NET_SENT}], rax
    mov qword ptr [rdi + {NET_HELD}], 1
    movzx eax, ax
    shl rax, 16
    or rax, {NO_INTERRUPT}
    mov [rdi + {FROM_AVAIL}], rax
    mov rbx, [r15 + {NET_WINDOW}]
    mov dword ptr [rbx + 0x50], 1
9:  ret

83: // Offers the next buffer. In: rdi.
    mov rax, [rdi + {NET_OFFERED}]
    inc rax
    mov [rdi + {NET_OFFERED}], rax
    movzx eax, ax
    shl rax, 16
    movabs rcx, {TO_AVAIL_0}
    or rax, rcx
    mov [rdi + {TO_AVAIL}], rax
    mov rbx, [r15 + {NET_WINDOW}]
    mov dword ptr [rbx + 0x50], 0
    ret
"#
    };
}

pub(super) use net_program;
