//! The part of the guest program that works on a disk, in assembly; `image` puts it into the program. What it does is told where its
//! memory is laid out, in [`layout::disk`](super::layout::disk).
//!
//! The device is polled: once for each page that vCPU 0 writes, so that an idle disk costs the guest next to nothing, and memory and
//! disk are written at the same time.

/// Subroutines 70 (sets the disk up) and 71 (one step of work, without waiting). They may change all scratch registers. r15 and r14 as
/// everywhere; 63 counts a wrong word.
macro_rules! disk_program {
    () => {
        r#"
70: // Sets up the device, if there is one.
    mov rbx, [r15 + {DISK_WINDOW}]
    test rbx, rbx
    jz 9f
    mov edi, {DISK}
    mov dword ptr [rbx + 0x70], 0
    mov dword ptr [rbx + 0x70], 3
    // VERSION_1 and nothing else.
    mov dword ptr [rbx + 0x24], 1
    mov dword ptr [rbx + 0x20], 1
    mov dword ptr [rbx + 0x24], 0
    mov dword ptr [rbx + 0x20], 0
    mov dword ptr [rbx + 0x70], 11
    mov dword ptr [rbx + 0x30], 0
    mov dword ptr [rbx + 0x38], {DISK_QUEUE_SIZE}
    mov dword ptr [rbx + 0x80], {DISK} + {DISK_DESC}
    mov dword ptr [rbx + 0x84], 0
    mov dword ptr [rbx + 0x90], {DISK} + {DISK_AVAIL}
    mov dword ptr [rbx + 0x94], 0
    mov dword ptr [rbx + 0xa0], {DISK} + {DISK_USED}
    mov dword ptr [rbx + 0xa4], 0
    mov dword ptr [rbx + 0x44], 1
    mov dword ptr [rbx + 0x70], 15
    lea rax, [rdi + {DISK_HEADER}]
    mov [rdi + {DISK_DESC}], rax
    movabs rax, {DESC_HEADER}
    mov [rdi + {DISK_DESC} + 8], rax
    lea rax, [rdi + {DISK_DATA}]
    mov [rdi + {DISK_DESC} + 16], rax
    lea rax, [rdi + {DISK_STATUS}]
    mov [rdi + {DISK_DESC} + 32], rax
    movabs rax, {DESC_STATUS}
    mov [rdi + {DISK_DESC} + 40], rax
    // Capacity, in sectors.
    mov eax, [rbx + 0x100]
    mov edx, [rbx + 0x104]
    shl rdx, 32
    or rax, rdx
    shr rax, 3
    mov ecx, {BLOCKS_MAX}
    cmp rax, rcx
    cmova rax, rcx
    mov [rdi + {DISK_BLOCKS}], rax
9:  ret

71: // A step.
    mov edi, {DISK}
    cmp qword ptr [rdi + {DISK_BLOCKS}], 0
    je 9b
    cmp qword ptr [rdi + {DISK_STEP}], {STEP_IDLE}
    je 74f
    mov rax, [rdi + {DISK_USED}]
    shr rax, 16
    mov rcx, [rdi + {DISK_SUBMITTED}]
    cmp ax, cx
    jne 9b
    movzx edx, byte ptr [rdi + {DISK_STATUS}]
    mov rsi, [rdi + {DISK_BLOCK}]
    test edx, edx
    jz 1f
    // It failed: nobody knows what is on the disk.
    inc qword ptr [r14 + {DISK_ERRORS}]
    mov qword ptr [rdi + {DISK_GENERATIONS} + rsi * 8], 0
    xor r8d, r8d
    lea r9, [rdi + {DISK_STATUS}]
    call 63b
    jmp 73f
1:  cmp qword ptr [rdi + {DISK_STEP}], {STEP_READ}
    jne 72f
    // Read: compare, then write the next generation.
    mov rcx, [rdi + {DISK_GENERATIONS} + rsi * 8]
    test rcx, rcx
    jz 4f
    inc qword ptr [r14 + {DISK_CHECKED}]
    call 75f
    xor ecx, ecx
2:  mov rdx, [rdi + {DISK_DATA} + rcx]
    cmp rdx, r8
    jne 3f
    add r8, rax
    add ecx, 8
    cmp ecx, {PAGE}
    jb 2b
    jmp 4f
3:  inc qword ptr [r14 + {DISK_ERRORS}]
    lea r9, [rdi + {DISK_DATA} + rcx]
    call 63b
4:  mov rcx, [rdi + {DISK_GENERATIONS} + rsi * 8]
    inc rcx
    call 75f
    xor ecx, ecx
5:  mov [rdi + {DISK_DATA} + rcx], r8
    add r8, rax
    add ecx, 8
    cmp ecx, {PAGE}
    jb 5b
    mov qword ptr [rdi + {DISK_STEP}], {STEP_WRITE}
    mov edx, {REQUEST_WRITE}
    xor ecx, ecx
    jmp 76f

72: // Written.
    inc qword ptr [rdi + {DISK_GENERATIONS} + rsi * 8]
    inc qword ptr [r14 + {DISK_WRITTEN}]
73: // The next block.
    inc rsi
    cmp rsi, [rdi + {DISK_BLOCKS}]
    jb 1f
    xor esi, esi
1:  mov [rdi + {DISK_BLOCK}], rsi
74: // Reads the block.
    mov rsi, [rdi + {DISK_BLOCK}]
    mov qword ptr [rdi + {DISK_STEP}], {STEP_READ}
    mov edx, {REQUEST_READ}
    movabs rcx, {DESC_WRITE}
    jmp 76f

75: // In: rsi = block, rcx = generation. Out: r8 = its first word, rax = from a word to the next.
    movabs r8, {STAMP_PAGE}
    imul r8, rsi
    movabs rax, {STAMP_PASS}
    imul rcx, rax
    add r8, rcx
    movabs rax, {STAMP_WORD}
    ret

76: // Submits. In: rsi = block, rdx = request, rcx = direction of the data.
    movabs rax, {DESC_DATA}
    or rax, rcx
    mov [rdi + {DISK_DESC} + 24], rax
    mov [rdi + {DISK_HEADER}], rdx
    shl rsi, 3
    mov [rdi + {DISK_HEADER} + 8], rsi
    mov qword ptr [rdi + {DISK_STATUS}], 0xff
    mov rax, [rdi + {DISK_SUBMITTED}]
    inc rax
    mov [rdi + {DISK_SUBMITTED}], rax
    movzx eax, ax
    shl rax, 16
    or rax, {NO_INTERRUPT}
    mov [rdi + {DISK_AVAIL}], rax
    mov rbx, [r15 + {DISK_WINDOW}]
    mov dword ptr [rbx + 0x50], 0
    ret
"#
    };
}

pub(super) use disk_program;
