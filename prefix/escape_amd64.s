#include "textflag.h"

// func scanEscapes(p *byte, n int) int
TEXT ·scanEscapes(SB), NOSPLIT, $0-24
	MOVQ p+0(FP), SI
	MOVQ n+8(FP), CX
	XORQ AX, AX
	MOVQ $0x5c5c5c5c5c5c5c5c, DX // backslash
	MOVQ DX, X0
	PUNPCKLQDQ X0, X0
	MOVQ $0x7575757575757575, DX // u
	MOVQ DX, X1
	PUNPCKLQDQ X1, X1
	MOVQ $0x2f2f2f2f2f2f2f2f, DX // slash
	MOVQ DX, X2
	PUNPCKLQDQ X2, X2

loop:
	LEAQ 17(AX), BX
	CMPQ BX, CX
	JGT  done
	MOVOU (SI)(AX*1), X3
	MOVOU 1(SI)(AX*1), X4
	PCMPEQB X0, X3
	MOVO X4, X5
	PCMPEQB X1, X4
	PCMPEQB X2, X5
	POR X5, X4
	PAND X4, X3
	PMOVMSKB X3, DX
	TESTL DX, DX
	JNZ  found
	ADDQ $16, AX
	JMP  loop

found:
	BSFL DX, DX
	ADDQ DX, AX

done:
	MOVQ AX, ret+16(FP)
	RET
