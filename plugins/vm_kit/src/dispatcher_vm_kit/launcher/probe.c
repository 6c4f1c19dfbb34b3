/*
 * The smallest guest that shows that a machine monitor really runs guests: it enters long mode with page tables of its
 * own, executes CPUID and RDTSC there, says so on the first serial port, and ends by a triple fault.
 *
 * Loaded by its PVH note, as the kernels of our guests are: 32-bit protected mode, no paging.
 */
__asm__(".pushsection .note.pvh,\"a\",@note\n"
	".balign 4\n"
	".long 4, 4, 18\n" /* name, description, XEN_ELFNOTE_PHYS32_ENTRY */
	".asciz \"Xen\"\n"
	".long start32\n"
	".popsection\n"

	".text\n"
	".code32\n"
	".globl start32\n"
	"start32:\n"
	"	cli\n"
	"	movl $pdpt + 3, pml4\n"
	"	movl $pd + 3, pdpt\n"
	"	movl $0x83, pd\n" /* one page of 2 MB, at 0, holds all of this */
	"	movl $pml4, %eax\n"
	"	movl %eax, %cr3\n"
	"	movl %cr4, %eax\n"
	"	orl $0x20, %eax\n" /* PAE */
	"	movl %eax, %cr4\n"
	"	movl $0xc0000080, %ecx\n" /* EFER */
	"	rdmsr\n"
	"	orl $0x100, %eax\n" /* LME */
	"	wrmsr\n"
	"	movl %cr0, %eax\n"
	"	orl $0x80000001, %eax\n" /* PG, PE */
	"	movl %eax, %cr0\n"
	"	lgdt gdt_at\n"
	"	ljmp $8, $start64\n"

	".code64\n"
	"start64:\n"
	"	xorl %eax, %eax\n"
	"	cpuid\n"
	"	rdtsc\n"
	"	movl $words, %esi\n"
	"1:	movb (%rsi), %al\n"
	"	testb %al, %al\n"
	"	jz 2f\n"
	"	movw $0x3f8, %dx\n"
	"	outb %al, %dx\n"
	"	incq %rsi\n"
	"	jmp 1b\n"
	"2:	lidt no_idt\n"
	"	int3\n"
	"3:	hlt\n"
	"	jmp 3b\n"

	".balign 8\n"
	"gdt:	.quad 0, 0x00209a0000000000\n"
	"gdt_at: .word 15\n"
	"	.long gdt\n"
	"	.balign 8\n"
	"no_idt: .word 0\n"
	"	.quad 0\n"
	"words:	.asciz \"guest ran\\n\"\n"
	".bss\n"
	".balign 4096\n"
	"pml4:	.skip 4096\n"
	"pdpt:	.skip 4096\n"
	"pd:	.skip 4096\n"
	".text\n");
